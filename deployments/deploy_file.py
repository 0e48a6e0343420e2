"""Reads a Serve configuration file and finds its mistakes before anything is started."""

from pathlib import Path

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from config.settings import AppSettings
from gemma_serve.errors import ConfigurationError

IMPORT_PATH = "serve_app:build_app"


def read_deploy_file(path: Path) -> ServeDeploySchema:
    """The file's content; ``ConfigurationError`` names every key that Serve or we do not know."""
    config = _parse(path)
    for application in config.applications:
        if application.import_path == IMPORT_PATH:
            AppSettings.model_validate(application.args)
    return config


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
