"""Which matrices are quantised, and how much memory that leaves; on the published shapes."""

import pytest
import torch
from torch import nn

from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.dummy import dummy_config, empty_model
from gemma_serve.gemma.quantization.matrices import (
    quantized_names,
    quantized_shapes,
    shapes_of_size,
    stored_bytes,
    what_fits,
)
from tests.tiny import tiny_text_model, tiny_vision_model

GIB = 1024**3


def gibibytes(size: str, quantization: Quantization) -> float:
    return stored_bytes(quantized_shapes(dummy_config(size), torch.bfloat16, quantization)) / GIB


def test_every_matrix_of_the_decoder_layers_and_no_other() -> None:
    model = tiny_vision_model(num_layers=6)
    names = quantized_names(model)
    per_layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(names) == 6 * len(per_layer)
    assert {name.rsplit(".", 1)[1] for name in names} == set(per_layer)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(quantized_names(tiny_text_model(num_layers=6))) == 6 * len(per_layer)


def test_matrices_with_a_bias_are_left_alone() -> None:
    model = tiny_text_model(num_layers=1)
    projection = model.model.layers[0].self_attn.o_proj
    projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    assert not [name for name in quantized_names(model) if name.endswith("o_proj")]


@pytest.mark.parametrize(
    ("size", "none", "one_byte", "nf4", "int4"),
    [
        ("270m", 0.50, 0.41, 0.365, 0.394),
        ("1b", 1.86, 1.21, 0.928, 1.182),
        ("4b", 8.01, 5.02, 3.714, 4.150),
        ("12b", 22.70, 12.69, 8.298, 9.202),
        ("27b", 51.10, 27.27, 16.826, 19.735),
    ],
)
def test_sizes_in_memory(size: str, none: float, one_byte: float, nf4: float, int4: float) -> None:
    """Of bfloat16, of 8 bits and a scale per row, of 4.5 bits, and of 5 bits in padded rows."""
    assert gibibytes(size, "none") == pytest.approx(none, abs=0.01)
    for kind in ("fp8", "torchao-int8", "bitsandbytes-8bit"):
        assert gibibytes(size, kind) == pytest.approx(one_byte, abs=0.01)
    assert gibibytes(size, "bitsandbytes-4bit") == pytest.approx(nf4, abs=0.01)
    assert gibibytes(size, "torchao-int4") == pytest.approx(int4, abs=0.01)


def test_shapes_of_a_quantised_checkpoint_add_up_to_its_files() -> None:
    shapes = shapes_of_size(dummy_config("4b"), torch.bfloat16, 5 * GIB)
    assert stored_bytes(shapes) == pytest.approx(5 * GIB, rel=1e-4)
    embedding = shapes.get_input_embeddings().weight
    assert embedding.dtype is torch.bfloat16


def test_who_chose_too_much_hears_what_fits() -> None:
    assert what_fits(dummy_config("27b"), 24 * GIB) == (
        "it would fit with quantization: bitsandbytes-4bit (16.8 GiB), torchao-int4 (19.7 GiB); or "
        "in bfloat16 with a smaller size: 270m (0.5 GiB), 1b (1.9 GiB), 4b (8.0 GiB)"
    )
    assert what_fits(dummy_config("27b"), GIB) == (
        "it would fit in bfloat16 with a smaller size: 270m (0.5 GiB)"
    )
    assert what_fits(dummy_config("27b"), GIB // 4) == "no size of Gemma 3 fits"


def test_loaded_weights_are_counted_once_though_two_modules_share_them() -> None:
    model = empty_model(dummy_config("270m"), dtype=torch.bfloat16, device=torch.device("meta"))
    assert stored_bytes(model) == 2 * 268_098_176
