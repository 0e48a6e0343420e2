"""``python -m deployments.launch serve_config.yaml``: ``serve run`` with a beginning and an end.

``serve run`` loops in silence whether the model has loaded or not. This says which, and stops when
it cannot be loaded.
"""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema
from ray.serve.scripts import cli as serve_cli

from config.settings import API_KEYS_VARIABLE, parse_api_keys
from deployments.deploy_file import DeployFile, read_deploy_file
from deployments.logs import configure_logging
from deployments.ports import require_unused
from gemma_serve.errors import ConfigurationError

# Not __name__, which is __main__ here.
logger = logging.getLogger("deployments.launch")

SERVE_NAMESPACE = "serve"
POLL_INTERVAL_S = 0.5


def main(argv: list[str]) -> int:
    """Serve what the file ``argv[0]`` says until Ctrl-C. Returns the exit status."""
    configure_logging()
    if len(argv) != 1:
        logger.error("usage: python -m deployments.launch CONFIG.yaml")
        return 2
    try:
        file = read_deploy_file(Path(argv[0]))
        api_keys = parse_api_keys(os.environ)
        models = {
            application: settings.to_api_config(api_keys).model_name
            for application, settings in file.settings.items()
        }
        _require_unused_ports(file)
    except ConfigurationError as error:
        logger.error("%s: %s", argv[0], error)
        return 2
    hosts = {host for host, _ in file.addresses}
    if not api_keys and not hosts <= {"127.0.0.1", "localhost", "::1"}:
        logger.warning("no API key is asked for: set %s to some", API_KEYS_VARIABLE)
    try:
        _submit(argv[0], file.config)
        return _watch(file, models)
    except KeyboardInterrupt:
        return 0
    except SystemExit:
        return 1  # `serve run` has printed why
    finally:
        logger.info("stopping")
        serve.shutdown()  # type: ignore[no-untyped-call]  # ray
        ray.shutdown()


def _require_unused_ports(file: DeployFile) -> None:
    """Raise ``ConfigurationError`` if another server has a port of ours.

    A cluster that is joined may serve the very application, to be updated, and on other machines.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    for host, port in sorted(file.addresses):
        require_unused(host, port)


def _submit(path: str, config: ServeDeploySchema) -> None:
    """Start Ray, or join the cluster at ``RAY_ADDRESS``, and hand it the file."""
    logger.info("starting Ray; then the model is loaded")
    # Ray reports to its makers otherwise. Nothing here needs the internet but a model's download.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's 15 lets whatever else runs take cores from the model's threads, which wait for each
    # other many times a step, and from the front end.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Serve's controller looks at its deployments ten times a second. That is 3 % of a core, and on
    # few cores the model's threads wait for it.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    ray.init(namespace=SERVE_NAMESPACE)
    # Ray's own handler of SIGTERM would not stop Serve in order, and SIGINT is ignored by what a
    # shell starts in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # `serve run` would start Serve too, but not tell it how to log.
    serve.start(
        proxy_location=config.proxy_location,
        http_options=config.http_options.model_dump(),
        grpc_options=config.grpc_options.model_dump(),
        controller_options=config.controller_options,
        logging_config=config.logging_config,
    )
    serve_cli.main(["run", "--non-blocking", path], standalone_mode=False)


def _watch(file: DeployFile, models: Mapping[str, str]) -> int:
    """Return once an application cannot start; go on for ever when all could.

    ``models``: what each of our applications serves.
    """
    while True:
        applications = serve.status().applications.values()
        failed = [app for app in applications if app.status == ApplicationStatus.DEPLOY_FAILED]
        if failed:
            logger.error("cannot start: %s", _reasons(failed))
            return 1
        if applications and all(app.status == ApplicationStatus.RUNNING for app in applications):
            break
        time.sleep(POLL_INTERVAL_S)
    for application, model in models.items():
        logger.info("ready: %s model=%s", file.base_url(application), model)
    while True:
        time.sleep(3600)


def _reasons(failed: Iterable[ApplicationStatusOverview]) -> str:
    messages = [
        deployment.message
        for application in failed
        for deployment in application.deployments.values()
        if deployment.status == "DEPLOY_FAILED"
    ]
    return "\n".join(map(_reason, messages or [application.message for application in failed]))


def _reason(message: str) -> str:
    """Our own error's sentence, out of the stack traces that Serve puts around it."""
    *_, sentence = re.split(r"^gemma_serve\.errors\.\w+: ", message, flags=re.MULTILINE)
    return sentence.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
