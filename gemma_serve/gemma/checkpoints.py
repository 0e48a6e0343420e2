"""From the operator's name of a model to where its weights are.

The HTTP side imports this for names, so neither torch nor transformers may be imported here.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import snapshot_download

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.hub import Download, fetch

DummySize = Literal["270m", "1b", "4b", "12b", "27b"]
DUMMY_SIZES: Final[tuple[DummySize, ...]] = ("270m", "1b", "4b", "12b", "27b")
MODEL_TYPES: Final = ("gemma3", "gemma3_text")

_DEMO_NAMES: Final = {"demo": "gemma-3-270m-demo", "demo-vision": "gemma-3-270m-demo-vision"}
_DUMMY_PREFIX: Final = "dummy:"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class DemoCheckpoint:
    """The demo, converted from an installed package at first use."""

    vision: bool


@dataclass(frozen=True, slots=True)
class DummyCheckpoint:
    """Random weights in the shapes of one size."""

    size: DummySize


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """A GGUF file, converted at first use."""

    path: Path


@dataclass(frozen=True, slots=True)
class FolderCheckpoint:
    """A folder that holds a Gemma 3's ``config.json`` and all its safetensors."""

    folder: Path


Checkpoint = DemoCheckpoint | DummyCheckpoint | GGUFCheckpoint | FolderCheckpoint


def served_name(model: str) -> str:
    """The name that clients use for ``ModelConfig.model``. Never a path of the machine.

    Looks at the text alone, so that every process comes to the same name.
    """
    if model in _DEMO_NAMES:
        return _DEMO_NAMES[model]
    if model.startswith(_DUMMY_PREFIX):
        return f"gemma-3-{_dummy_size(model)}-dummy"
    if model.endswith(".gguf"):
        return Path(model).stem
    return model if _HUB_ID.fullmatch(model) else Path(os.path.abspath(model)).name


def resolve(config: ModelConfig, *, download: Download = snapshot_download) -> Checkpoint:
    """Find the model, fetching it if it is on the Hub, and check that it can be served.

    ``download``: another ``snapshot_download``, for tests. Raises ``CheckpointError``.
    """
    checkpoint = _local_checkpoint(config.model)
    if checkpoint is None:
        folder = fetch(_require_hub_id(config.model), config.revision, download)
        checkpoint = FolderCheckpoint(folder)
    elif config.revision is not None:
        raise ConfigurationError(
            f"revision: {config.revision!r} is for a Hub id only, and model {config.model} is not "
            "fetched from there: leave it out"
        )
    if isinstance(checkpoint, FolderCheckpoint):
        _check_folder(checkpoint.folder, config.model)
    return checkpoint


def _local_checkpoint(model: str) -> Checkpoint | None:
    """What needs no Hub, or ``None``."""
    if model in _DEMO_NAMES:
        return DemoCheckpoint(vision=model == "demo-vision")
    if model.startswith(_DUMMY_PREFIX):
        return DummyCheckpoint(_dummy_size(model))
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        if not path.is_file():
            raise CheckpointError(f"model: there is no file {model}")
        return GGUFCheckpoint(path)
    return FolderCheckpoint(path) if path.exists() else None


def _dummy_size(model: str) -> DummySize:
    size = model.removeprefix(_DUMMY_PREFIX)
    if size not in DUMMY_SIZES:
        raise CheckpointError(f"model: {model!r} is not one of {_joined(DUMMY_SIZES, 'dummy:')}")
    return size


def _joined(names: Sequence[str], prefix: str = "") -> str:
    return ", ".join(prefix + name for name in names)


def _require_hub_id(model: str) -> str:
    if _HUB_ID.fullmatch(model):
        return model
    if "/" in model:
        raise CheckpointError(f"model: there is no folder {model}, and it is not a Hub id")
    known = [*_DEMO_NAMES, *(_DUMMY_PREFIX + size for size in DUMMY_SIZES)]
    close = difflib.get_close_matches(model, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise CheckpointError(
        f"model: {model!r} is not known: {hint}It must be one of {_joined(known)}, an existing "
        "folder or .gguf file, or a Hub id such as google/gemma-3-4b-it"
    )


def _check_folder(folder: Path, model: str) -> None:
    config = read_json(folder / "config.json", model)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"model: {model} is not a Gemma 3: its config.json has model_type {model_type!r}, "
            f"not {' or '.join(MODEL_TYPES)}"
        )
    _check_weights(folder, model)


def _check_weights(folder: Path, model: str) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(read_json(index, model)["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).exists())
        if missing:
            raise CheckpointError(
                f"model: {model} lacks {len(missing)} of {len(shards)} weight files "
                f"({missing[0]}, ...): copy or download it again"
            )
    elif not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"model: {model} has no model.safetensors; other weight formats are not loaded"
        )


def read_json(path: Path, model: str) -> dict[str, Any]:
    """One of the checkpoint's files. Raises ``CheckpointError`` that names it and ``model``."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"model: {model} is not a checkpoint: it has no {path.name}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"model: {path.name} of {model} cannot be read: {error}") from error
    return content
