from pathlib import Path

import numpy as np
import pytest

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.gguf_conversion import convert_gguf, gguf_checkpoint

gguf = pytest.importorskip("gguf", reason="needs the extra `demo`")

SHAPE_270M = {
    "block_count": 18,
    "embedding_length": 640,
    "feed_forward_length": 2048,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 256,
    "attention.sliding_window": 512,
    "context_length": 32_768,
}


def write_gguf(path: Path, *, architecture: str = "gemma3", **changed: int) -> Path:
    """The metadata of Gemma 3 270M, a vocabulary of four tokens, and one foreign tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**SHAPE_270M, **changed}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>"])
    writer.add_token_types([3, 3, 3, 3])
    writer.add_tensor("v.patch_embd.weight", np.zeros((1, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(path, folder)
    return str(caught.value)


def test_larger_size_is_refused_with_the_reason(tmp_path: Path) -> None:
    """transformers would load it with a wrong scale and rope: mlx-vlm#1709 again."""
    path = write_gguf(tmp_path / "27b.gguf", block_count=62)
    message = refusal(path, tmp_path)
    assert message.startswith("27b.gguf has 62 layers. Only GGUF files of Gemma 3 270M (18) and 1B")
    assert "does not carry the attention scale" in message


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", architecture="llama")
    assert refusal(path, tmp_path) == "x.gguf is not a Gemma 3: its architecture is 'llama'"


def test_other_shape_is_refused_by_field(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", embedding_length=768)
    assert refusal(path, tmp_path) == (
        "x.gguf is not a Gemma 3 270m: gemma3.embedding_length is 768, not 640"
    )


def test_foreign_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    assert refusal(path, tmp_path) == (
        "x.gguf has the tensor v.patch_embd.weight, which Gemma 3 has not"
    )


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\x03\x00\x00\x00"])
def test_unreadable_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert "x.gguf is not a readable GGUF file" in refusal(path, tmp_path)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").mkdir()  # root may read any file
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be read: Is a directory"):
        gguf_checkpoint(tmp_path / "x.gguf")


def test_refused_file_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_SERVE_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError):
        gguf_checkpoint(path)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
