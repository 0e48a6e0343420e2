import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.http_server import OpenAIServer
from deployments.ingress import OpenAIIngress
from gemma_serve.openai_api.config import ApiConfig
from tests.serve.scripted_gemma import ScriptedGemma, SlowlyLoadingGemma

# Two cores are enough for everything that runs at once.
LITTLE = {"num_cpus": 0.1}

StartLoading = Callable[[str, Path], str]
"""Deploy ``SlowlyLoadingGemma`` under a name, with its file; gives the server's address."""


@dataclass(frozen=True, slots=True)
class Server:
    """The real ingress before a scripted model, on a real cluster."""

    url: str
    gemma: DeploymentHandle[Any]
    application: str


@pytest.fixture(scope="session")
def http_port() -> Iterator[int]:
    """The port of a Serve instance that runs as long as the tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    port = free_port()
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()  # type: ignore[no-untyped-call]  # ray
    ray.shutdown()


@pytest.fixture(scope="session", params=["proxied", "listening"])
def server(request: pytest.FixtureRequest, http_port: int) -> Server:
    """One replica that takes as many requests as come, behind Serve's proxy or without."""
    gemma = serve.deployment(
        ray_actor_options=LITTLE, max_ongoing_requests=100, health_check_period_s=0.5
    )(ScriptedGemma)
    name: str = request.param
    if name == "proxied":
        return _run(name, http_port, gemma.bind())
    port = free_port()
    serve.run(_listening(gemma.bind(), port), name=name, route_prefix=f"/{name}")
    handle = serve.get_deployment_handle("ScriptedGemma", name)
    return Server(f"http://127.0.0.1:{port}", handle, name)


@pytest.fixture(scope="session")
def full_server(http_port: int) -> Server:
    """One replica that works on one request; one more may wait for it."""
    gemma = serve.deployment(
        ray_actor_options=LITTLE, max_ongoing_requests=1, max_queued_requests=1
    )(ScriptedGemma)
    return _run("tight", http_port, gemma.bind())


@pytest.fixture
def start_loading(http_port: int) -> Iterator[StartLoading]:
    names = []

    def start(name: str, may_finish: Path) -> str:
        gemma = serve.deployment(
            ray_actor_options=LITTLE, max_constructor_retry_count=1, health_check_period_s=0.5
        )(SlowlyLoadingGemma)
        app = serve.RunTarget(_with_ingress(gemma.bind(may_finish)), name, f"/{name}")
        serve.run_many([app], wait_for_applications_running=False)
        names.append(name)
        return f"http://127.0.0.1:{http_port}/{name}"

    yield start
    for name in names:
        serve.delete(name)


def _run(name: str, http_port: int, gemma: Application) -> Server:
    serve.run(_with_ingress(gemma), name=name, route_prefix=f"/{name}")
    handle = serve.get_deployment_handle("ScriptedGemma", name)
    return Server(f"http://127.0.0.1:{http_port}/{name}", handle, name)


def _listening(gemma: Application, port: int) -> Application:
    front_end = serve.deployment(ray_actor_options=LITTLE)(OpenAIServer)
    return front_end.bind(gemma, ApiConfig(model_name="scripted"), 20.0, "127.0.0.1", port)


def _with_ingress(gemma: Application) -> Application:
    ingress = serve.deployment(ray_actor_options=LITTLE, max_ongoing_requests=100)(OpenAIIngress)
    return ingress.bind(gemma, ApiConfig(model_name="scripted"), 20.0)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
