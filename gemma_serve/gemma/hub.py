"""Downloads from the Hugging Face Hub, with errors that say what to do."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from huggingface_hub import errors

from gemma_serve.errors import CheckpointError

logger = logging.getLogger(__name__)

Download = Callable[..., str]
"""Called as ``huggingface_hub.snapshot_download``."""

_FILES: Final = ["*.safetensors", "*.json", "*.jinja", "*.model"]


def fetch(repo_id: str, revision: str | None, download: Download) -> Path:
    """Return the folder with the files of ``repo_id``, downloading those that are not cached.

    The library itself reads ``HF_TOKEN`` and ``HF_HOME``. Raises ``CheckpointError``.
    """
    logger.info("fetching %s from the Hugging Face Hub, unless it is cached", repo_id)
    try:
        return Path(download(repo_id, revision=revision, allow_patterns=_FILES))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"model: {_reason(error, repo_id, revision)}") from error


def _reason(error: Exception, repo_id: str, revision: str | None) -> str:
    page = f"https://huggingface.co/{repo_id}"
    match error:
        case errors.GatedRepoError():
            return (
                f"{repo_id} is gated: accept its licence at {page} and set HF_TOKEN to a token of "
                "the account that did"
            )
        case errors.RepositoryNotFoundError():
            return f"{repo_id} does not exist, or is private: check {page}, or set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}: see {page}/tree/main"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            return (
                f"{repo_id} is not complete in the local Hub cache, and {_why_offline()}. Or fetch "
                f"it elsewhere (hf download {repo_id}) and set model to that folder, or try demo"
            )
    return f"{repo_id} could not be fetched: {error}"


def _why_offline() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return "HF_HUB_OFFLINE forbids the network: unset it"
    return "the Hub cannot be reached: check the network"
