"""Puts a model's weights on its devices."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.dummy import (
    AnyGemma3Config,
    Gemma3Model,
    empty_model,
    model_class,
    randomize_weights,
)
from gemma_serve.gemma.placement import Placement
from gemma_serve.gemma.progress import Progress

logger = logging.getLogger(__name__)

_WEIGHTS_BAR: Final = "Loading weights"  # transformers' name for it


def load_weights(folder: Path, placement: Placement) -> Gemma3Model:
    """The model in ``folder``. Raises ``CheckpointError`` if any weight is missing or misshapen."""
    files = sorted(folder.glob("*.safetensors"))
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    with _progress_in_log(f"loading {gigabytes:.2f} GB of weights"):
        model, report = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
            folder,
            dtype=placement.dtype,
            device_map=_device_map(placement),
            output_loading_info=True,
        )
    if wrong := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise CheckpointError(
            f"the checkpoint lacks {len(wrong)} weights of the model, or has them in another "
            f"shape, such as {wrong[0]}: copy or download it again"
        )
    if len(placement.devices) == 1:
        model.to(placement.devices[0])
    _require_tied_embedding_on_one_device(model)
    loaded: Gemma3Model = model.eval().requires_grad_(False)
    return loaded


def random_weights(config: AnyGemma3Config, placement: Placement) -> Gemma3Model:
    """A model with random weights, made where they stay."""
    if len(placement.devices) == 1:
        model = empty_model(config, dtype=placement.dtype, device=placement.devices[0])
    else:
        model = _spread(empty_model(config, dtype=placement.dtype, device=torch.device("cpu")))
    randomize_weights(model)
    return model


def _device_map(placement: Placement) -> str | dict[str, torch.device] | None:
    if len(placement.devices) > 1:
        return "auto"  # accelerate balances the layers over all visible GPUs
    device = placement.devices[0]
    # Straight to the GPU, without a copy of the whole model in the machine's memory.
    return {"": device} if device.type == "cuda" and is_accelerate_available() else None


def _spread(model: Gemma3Model) -> Gemma3Model:
    """Divide the layers over all visible GPUs as ``device_map="auto"`` does for a checkpoint."""
    from accelerate import dispatch_model, infer_auto_device_map  # only several GPUs need it
    from accelerate.utils import get_balanced_memory

    whole = ["Gemma3DecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings"]
    max_memory = get_balanced_memory(model, no_split_module_classes=whole)
    device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=whole)
    spread: Gemma3Model = dispatch_model(model, device_map)
    return spread


def _require_tied_embedding_on_one_device(model: Gemma3Model) -> None:
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.device != lm_head.device:
        raise CheckpointError(
            f"the tied embedding was split over {embedding.device} and {lm_head.device}: use "
            "fewer GPUs"
        )


@contextmanager
def _progress_in_log(what: str) -> Iterator[None]:
    """Turn transformers' progress bar, which is for terminals, into log lines."""

    def bar(make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and kwargs.get("desc") == _WEIGHTS_BAR:
            return _logged(args[0], what)
        return make(*args, **{**kwargs, "disable": True})

    previous = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _logged(weights: Iterable[Any], what: str) -> Iterator[Any]:
    weights = list(weights)
    progress = Progress(what, len(weights))
    for weight in weights:
        yield weight
        progress.advance(1)
