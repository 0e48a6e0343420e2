"""Reads a Serve configuration file and finds its mistakes before anything is started."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from config.settings import AppSettings
from gemma_serve.errors import ConfigurationError

IMPORT_PATH = "serve_app:build_app"


@dataclass(frozen=True, slots=True)
class DeployFile:
    """What Serve is to do, checked."""

    config: ServeDeploySchema
    settings: Mapping[str, AppSettings]
    """By application name. Applications that are not ours have none."""

    @property
    def addresses(self) -> frozenset[tuple[str, int]]:
        """The hosts and ports that our applications listen at."""
        proxy = self.config.http_options
        return frozenset(
            (proxy.host, proxy.port) if settings.port is None else (settings.host, settings.port)
            for settings in self.settings.values()
        )

    def base_url(self, application: str) -> str:
        """Where clients on the same machine reach one of our applications."""
        settings, http = self.settings[application], self.config.http_options
        if settings.port is not None:
            return _url(settings.host, settings.port, "/")
        prefixes = {app.name: app.route_prefix for app in self.config.applications}
        return _url(http.host, http.port, prefixes[application])


def read_deploy_file(path: Path) -> DeployFile:
    """The file's content; ``ConfigurationError`` names every key that Serve or we do not know."""
    config = _parse(path)
    settings = {
        application.name: AppSettings.model_validate(application.args)
        for application in config.applications
        if application.import_path == IMPORT_PATH
    }
    users: dict[int, str] = {}
    for name, ours in settings.items():
        _check_port(config, name, ours)
        if ours.port is not None and (other := users.setdefault(ours.port, name)) != name:
            raise ConfigurationError(
                f"{name}: {other} listens at port {ours.port} too; each needs its own"
            )
    return DeployFile(config, settings)


def _check_port(config: ServeDeploySchema, application: str, settings: AppSettings) -> None:
    has_proxies = config.proxy_location != ProxyLocation.Disabled
    if settings.port is None and not has_proxies:
        raise ConfigurationError(
            f"{application}: nobody listens; set a port, or a proxy_location other than Disabled"
        )
    # Serve's proxies would share the port, and get some of the connections.
    if settings.port == config.http_options.port and has_proxies:
        raise ConfigurationError(
            f"{application}: Serve's proxies listen at port {settings.port} too; set "
            "proxy_location: Disabled, or another http_options.port"
        )


def _url(host: str, port: int, route_prefix: str | None) -> str:
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}{(route_prefix or '').rstrip('/')}/v1"


def _parse(path: Path) -> ServeDeploySchema:
    try:
        # Serve itself ignores keys that it does not know.
        return ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()), extra="forbid")
    except OSError as error:
        raise ConfigurationError(f"cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"is not valid YAML: {error}") from None
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, mistake['loc'])) or 'the file'}: {mistake['msg']}"
            for mistake in error.errors(include_url=False)
        ]
        raise ConfigurationError("\n  ".join(["Serve cannot use this:", *lines])) from None
