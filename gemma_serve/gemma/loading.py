"""Loads the configured model and everything that its checkpoint says about its use."""

import logging
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.chat_templates import GEMMA_CHAT_TEMPLATE
from gemma_serve.gemma.checkpoints import (
    DemoCheckpoint,
    DummyCheckpoint,
    DummySize,
    FolderCheckpoint,
    GGUFCheckpoint,
    read_json,
    resolve,
    served_name,
)
from gemma_serve.gemma.config import ModelConfig, Quantization
from gemma_serve.gemma.demo import demo_checkpoint, demo_vision_checkpoint
from gemma_serve.gemma.dummy import Gemma3Model, dummy_config, dummy_generation_config
from gemma_serve.gemma.function_calling import END_OF_CALLS, tool_tokens
from gemma_serve.gemma.gguf_conversion import gguf_checkpoint
from gemma_serve.gemma.placement import Placement, place
from gemma_serve.gemma.quantization.kinds import require_kind
from gemma_serve.gemma.quantization.matrices import stored_bytes
from gemma_serve.gemma.quantization.quantized_checkpoints import (
    quantization_method,
    require_loadable,
)
from gemma_serve.gemma.synthetic_tokenizer import synthetic_tokenizer
from gemma_serve.gemma.weights import load_weights, random_weights
from gemma_serve.generation import PanAndScan, SamplingParams, VisionInput

logger = logging.getLogger(__name__)

_VOCABULARY_FILES: Final = ("tokenizer.json", "tokenizer.model")
_END_OF_TURN: Final = "<end_of_turn>"
_NEUTRAL: Final = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGemma:
    """A model in memory, and how its checkpoint wants it used."""

    name: str
    """As clients call it."""
    model: Gemma3Model
    """In eval mode, without gradients, on its devices."""
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    """Tokens that the model was trained for."""
    default_sampling: SamplingParams
    eos_token_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    """End a completion besides ``eos_token_ids``."""
    vision: VisionInput | None
    """``None``: the model takes text only."""
    image_mean: tuple[float, ...] = _NEUTRAL
    image_std: tuple[float, ...] = _NEUTRAL
    """Per colour, for pixels in [0, 1]."""


def load_gemma(config: ModelConfig) -> LoadedGemma:
    """Find, fetch or convert, and load ``config.model``. Takes seconds to minutes.

    Raises ``ConfigurationError`` (``CheckpointError``), with what to do about it.
    """
    start = perf_counter()
    name = served_name(config.model)
    placement = place(config)
    require_kind(config.quantization, placement)
    checkpoint = resolve(config)
    logger.info("loading %s on %s", name, ", ".join(map(str, placement.devices)))
    try:
        if isinstance(checkpoint, DummyCheckpoint):
            loaded = _load_dummy(checkpoint.size, name, placement, config.quantization)
        else:
            loaded = _load_folder(_folder(checkpoint), name, placement, config.quantization)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(f"{name} does not fit the memory of the GPU: {error}") from error
    _log_loaded(loaded, config.quantization, perf_counter() - start)
    return loaded


def _folder(checkpoint: DemoCheckpoint | GGUFCheckpoint | FolderCheckpoint) -> Path:
    match checkpoint:
        case DemoCheckpoint(vision=True):
            return demo_vision_checkpoint()
        case DemoCheckpoint():
            return demo_checkpoint()
        case GGUFCheckpoint(path):
            return gguf_checkpoint(path)
        case FolderCheckpoint(folder):
            return folder


def _load_dummy(
    size: DummySize, name: str, placement: Placement, quantization: Quantization
) -> LoadedGemma:
    model_config = dummy_config(size)
    image_token_id = getattr(model_config, "image_token_id", None)
    model = random_weights(model_config, placement, name, quantization)
    tokenizer = synthetic_tokenizer(image_token_id=image_token_id)
    return _describe(name, model, tokenizer, dummy_generation_config(), preprocessor={})


def _load_folder(
    folder: Path, name: str, placement: Placement, quantization: Quantization
) -> LoadedGemma:
    method = quantization_method(folder, name)
    require_loadable(method, name, quantization)
    tokenizer = _load_tokenizer(folder, name)
    model = load_weights(folder, placement, name, quantization)
    path = folder / "preprocessor_config.json"  # text-only checkpoints have none
    preprocessor = read_json(path, name) if path.exists() else {}
    return _describe(name, model, tokenizer, model.generation_config, preprocessor)


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    # Without a vocabulary, transformers makes up a tokenizer of five tokens.
    if not any((folder / file).exists() for file in _VOCABULARY_FILES):
        raise CheckpointError(f"{name} has no tokenizer: it lacks {_VOCABULARY_FILES[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.chat_template is None:
        logger.warning(
            "%s has no chat template, like pre-trained models; it gets that of the instruction-"
            "tuned Gemma 3 and may not keep to it",
            name,
        )
        tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    return tokenizer


def _describe(
    name: str,
    model: Gemma3Model,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    preprocessor: dict[str, Any],
) -> LoadedGemma:
    return LoadedGemma(
        name=name,
        model=model,
        tokenizer=tokenizer,
        max_model_len=model.config.get_text_config().max_position_embeddings,
        default_sampling=default_sampling(generation),
        eos_token_ids=_eos_token_ids(generation, tokenizer),
        stop_strings=_stop_strings(generation),
        vision=_vision_input(model.config, preprocessor),
        image_mean=tuple(preprocessor.get("image_mean") or _NEUTRAL),
        image_std=tuple(preprocessor.get("image_std") or _NEUTRAL),
    )


def default_sampling(generation: GenerationConfig) -> SamplingParams:
    """The checkpoint's sampling; OpenAI's defaults for what it leaves open."""
    neutral = SamplingParams()
    penalty = neutral.repetition_penalty if (r := generation.repetition_penalty) is None else r
    if generation.do_sample is False:
        return SamplingParams(temperature=0.0, repetition_penalty=penalty)
    return SamplingParams(
        repetition_penalty=penalty,
        temperature=neutral.temperature if (t := generation.temperature) is None else t,
        top_p=neutral.top_p if (p := generation.top_p) is None else p,
        top_k=generation.top_k or None,  # transformers turns it off with 0
        min_p=neutral.min_p if (m := generation.min_p) is None else m,
    )


def _eos_token_ids(
    generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    configured = generation.eos_token_id
    token_ids = {configured} if isinstance(configured, int) else set(configured or ())
    token_ids.add(tokenizer.eos_token_id)
    # Some conversions name <eos> alone, and a chat would never end.
    if _END_OF_TURN in tokenizer.get_vocab():
        token_ids.add(tokenizer.convert_tokens_to_ids(_END_OF_TURN))
    if tool_tokens(tokenizer):
        token_ids.add(tokenizer.convert_tokens_to_ids(END_OF_CALLS))
    return frozenset(token_ids - {None})


def _stop_strings(generation: GenerationConfig) -> tuple[str, ...]:
    configured = generation.stop_strings
    return (configured,) if isinstance(configured, str) else tuple(configured or ())


def _vision_input(model_config: Any, preprocessor: dict[str, Any]) -> VisionInput | None:
    if model_config.model_type != "gemma3":
        return None
    default = PanAndScan()
    # The Hub's files say null for what transformers' defaults decide.
    return VisionInput(
        view_size=model_config.vision_config.image_size,
        tokens_per_view=model_config.mm_tokens_per_image,
        pan_and_scan=PanAndScan(
            min_crop_size=preprocessor.get("pan_and_scan_min_crop_size") or default.min_crop_size,
            max_num_crops=preprocessor.get("pan_and_scan_max_num_crops") or default.max_num_crops,
            min_ratio_to_activate=preprocessor.get("pan_and_scan_min_ratio_to_activate")
            or default.min_ratio_to_activate,
        ),
    )


def _log_loaded(loaded: LoadedGemma, quantization: Quantization, elapsed_s: float) -> None:
    logger.info(
        "loaded %s: %.2f GB of %s weights%s in %.1f s",
        loaded.name,
        stored_bytes(loaded.model) / 1e9,
        str(loaded.model.dtype).removeprefix("torch."),
        "" if quantization == "none" else f" with {quantization} matrices",
        elapsed_s,
    )
