"""The one model that requests may name."""

from gemma_serve.errors import NotFoundError
from gemma_serve.openai_api.config import ApiConfig


def check_model(name: str, config: ApiConfig) -> None:
    """Raise ``NotFoundError`` unless ``name`` is the served model."""
    if name != config.model_name:
        raise NotFoundError(
            f"The model {name[:128]!r} does not exist; this server has {config.model_name!r}",
            param="model",
            code="model_not_found",
        )
