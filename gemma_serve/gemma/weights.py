"""Puts a model's weights on its devices."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.dummy import (
    AnyGemma3Config,
    Gemma3Model,
    empty_model,
    model_class,
    randomize_weights,
)
from gemma_serve.gemma.placement import Placement
from gemma_serve.gemma.progress import Progress
from gemma_serve.gemma.quantization.linears import quantize_linear
from gemma_serve.gemma.quantization.matrices import (
    quantized_names,
    quantized_shapes,
    shapes_of_size,
    what_fits,
)
from gemma_serve.gemma.quantization.quantized_checkpoints import explained, require_no_float16
from gemma_serve.gemma.quantization.streaming import StreamingQuantization

logger = logging.getLogger(__name__)

_GIB: Final = 1024**3
_MAX_SHARE_OF_ONE_GPU: Final = 0.6
"""Weights that take no more of a GPU's free memory leave room for the keys and values of many
chats. On one GPU they are faster: where several share the layers, each waits for the others."""
WHOLE: Final = [
    "Gemma3DecoderLayer",
    "Gemma3MultiModalProjector",
    "SiglipEncoderLayer",
    "SiglipVisionEmbeddings",
]
"""Modules whose parts need each other on one device."""
_WEIGHTS_BAR: Final = "Loading weights"  # transformers' name for it


def load_weights(
    folder: Path, placement: Placement, name: str, quantization: Quantization = "none"
) -> Gemma3Model:
    """The model in ``folder``, which messages call ``name``.

    Raises ``CheckpointError`` if any weight is missing or misshapen, ``ConfigurationError`` if the
    GPUs cannot hold them.
    """
    config = AutoConfig.from_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    if is_quantized := hasattr(config, "quantization_config"):
        shapes = shapes_of_size(config, placement.dtype, num_bytes)
    else:
        shapes = quantized_shapes(config, placement.dtype, quantization)
    device_map = _device_map(shapes, placement, name)
    with (
        _progress_in_log(f"loading {num_bytes / 1e9:.2f} GB of weights"),
        explained(name) if is_quantized else nullcontext(),
    ):
        model, report = model_class(config).from_pretrained(
            folder,
            dtype=placement.dtype,
            # Straight to the GPU, without a copy of the whole model in the machine's memory.
            device_map=device_map if placement.devices[0].type == "cuda" else None,
            quantization_config=None
            if quantization == "none"
            else StreamingQuantization(quantization),
            output_loading_info=True,
        )
    if wrong := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise CheckpointError(
            f"the checkpoint lacks {len(wrong)} weights of the model, or has them in another "
            f"shape, such as {wrong[0]}: copy or download it again"
        )
    _require_tied_embedding_on_one_device(model)
    require_no_float16(model, name)
    loaded: Gemma3Model = model.eval().requires_grad_(False)
    return loaded


def random_weights(
    config: AnyGemma3Config, placement: Placement, name: str, quantization: Quantization = "none"
) -> Gemma3Model:
    """A model with random weights, made where they stay unless several GPUs share them.

    Raises ``ConfigurationError`` if these cannot hold them.
    """
    shapes = quantized_shapes(config, placement.dtype, quantization)
    device_map = _device_map(shapes, placement, name)
    if quantization != "none":
        return _random_quantized(config, placement, device_map, quantization)
    match device_map:
        case {"": device}:
            model = empty_model(config, dtype=placement.dtype, device=device)
        case _:
            model = empty_model(config, dtype=placement.dtype, device=torch.device("cpu"))
            model = dispatch_model(model, device_map)
    randomize_weights(model)
    return model


def _random_quantized(
    config: AnyGemma3Config,
    placement: Placement,
    device_map: dict[str, torch.device],
    quantization: Quantization,
) -> Gemma3Model:
    """Never holds more than one of the matrices as it was before."""
    # What the machine's memory has of the model is not touched, so it takes none.
    model = empty_model(config, dtype=placement.dtype, device=torch.device("cpu"))
    linears = {name: model.get_submodule(name) for name in quantized_names(model)}
    for name in linears:
        model.set_submodule(name, nn.Identity())
    model = dispatch_model(model, device_map, force_hooks=False)
    randomize_weights(model)
    for seed, (name, linear) in enumerate(linears.items()):
        linear.to_empty(device=_device_of(name, device_map))
        randomize_weights(linear, seed=seed)
        model.set_submodule(name, quantize_linear(linear, quantization))
    return model


def _device_of(name: str, device_map: dict[str, torch.device]) -> torch.device:
    return next(
        device
        for part, device in device_map.items()
        if not part or name == part or name.startswith(f"{part}.")
    )


def _device_map(shapes: Gemma3Model, placement: Placement, name: str) -> dict[str, torch.device]:
    """Where each part goes. ``shapes``: the model on the meta device."""
    if placement.devices[0].type == "cpu":
        if (available := _available_bytes()) is not None:
            require_memory(shapes, available, name, "the machine")
        return {"": placement.devices[0]}
    free_bytes = [torch.cuda.mem_get_info(device)[0] for device in placement.devices]
    if len(placement.devices) == 1:
        require_memory(shapes, free_bytes[0], name, "the GPU")
        return {"": placement.devices[0]}
    return share_layers(shapes, free_bytes, name)


def _available_bytes() -> int | None:
    """Of the machine's memory, what can be had without swapping; ``None`` if it does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    kib = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    return None if kib is None else int(kib[1]) * 1024


def require_memory(model: Gemma3Model, free_bytes: int, name: str, where: str) -> None:
    """Raise ``ConfigurationError`` unless ``free_bytes`` hold the weights of ``model``.

    ``model`` may be on the meta device.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if num_bytes > free_bytes:
        raise ConfigurationError(
            f"model: {name} has {num_bytes / _GIB:.1f} GiB of weights, and {where} has "
            f"{free_bytes / _GIB:.1f} GiB free: {what_fits(model.config, free_bytes)}"
        )


def share_layers(
    model: Gemma3Model, free_bytes: Sequence[int], name: str
) -> dict[str, torch.device]:
    """On which GPU each part of ``model`` goes: all on the first if it is large enough.

    ``free_bytes``: of each GPU. ``model`` may be on the meta device. Raises ``ConfigurationError``
    if a part finds no place.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if num_bytes <= _MAX_SHARE_OF_ONE_GPU * free_bytes[0]:
        logger.info("%s fits one GPU: the other %d stay unused", name, len(free_bytes) - 1)
        return {"": torch.device("cuda", 0)}
    # accelerate balances the layers, the last GPU's limit aside.
    max_memory = get_balanced_memory(model, dict(enumerate(free_bytes)), WHOLE)
    device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=WHOLE)
    if {"cpu", "disk"}.intersection(device_map.values()):
        free = ", ".join(f"{free / _GIB:.1f}" for free in free_bytes)
        raise ConfigurationError(
            f"model: {name} has {num_bytes / _GIB:.1f} GiB of weights, which do not fit the GPUs, "
            f"with {free} GiB free: give each replica more or larger GPUs (gpus_per_replica), free "
            f"their memory, or choose less: {what_fits(model.config, sum(free_bytes))}"
        )
    return {part: torch.device("cuda", gpu) for part, gpu in device_map.items()}


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
