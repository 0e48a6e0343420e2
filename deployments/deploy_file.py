"""Reads a Serve configuration file and finds its mistakes before anything is started."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
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


def read_deploy_file(path: Path) -> DeployFile:
    """The file's content; ``ConfigurationError`` names every key that Serve or we do not know."""
    config = _parse(path)
    settings = {
        application.name: AppSettings.model_validate(application.args)
        for application in config.applications
        if application.import_path == IMPORT_PATH
    }
    return DeployFile(config, settings)


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
