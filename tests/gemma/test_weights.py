"""How a model's layers are shared among GPUs; the tests pretend to have some."""

import logging

import pytest
import torch

from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.dummy import Gemma3Model, dummy_config, empty_model
from gemma_serve.gemma.quantization.matrices import quantized_shapes
from gemma_serve.gemma.weights import WHOLE, require_memory, share_layers

GIB = 1024**3
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def shapes_of(size: str) -> Gemma3Model:
    return empty_model(dummy_config(size), dtype=torch.bfloat16, device=torch.device("meta"))


def test_small_model_stays_on_the_first_of_many_gpus(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        device_map = share_layers(shapes_of("4b"), [24 * GIB] * 8, "tiny")
    assert device_map == {"": FIRST}
    assert "tiny fits one GPU: the other 7 stay unused" in caplog.text


def test_large_model_is_spread_in_whole_layers() -> None:
    model = shapes_of("4b")  # 8.0 GiB
    device_map = share_layers(model, [10 * GIB, 10 * GIB], "4b")
    assert set(device_map.values()) == {FIRST, SECOND}
    tied = model.lm_head.weight
    assert tied is model.get_input_embeddings().weight
    layers = [part for part in device_map if ".language_model.layers." in part]
    assert len(layers) == 34
    assert {part.count(".") for part in layers} == {3}
    assert device_map["lm_head"] == device_map["model.language_model.embed_tokens"]


def test_nothing_that_computes_with_weights_of_its_own_and_of_its_parts_is_ever_split() -> None:
    """accelerate moves the input of each part, but not what the whole computes between them."""
    model = shapes_of("4b")
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) and list(module.children()):
            parents = [model.get_submodule(name.rsplit(".", n)[0]) for n in range(name.count("."))]
            assert {type(m).__name__ for m in (module, *parents)} & set(WHOLE), name


def test_model_that_fits_no_gpus_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigurationError) as caught:
        share_layers(shapes_of("27b"), [24 * GIB, 20 * GIB], "google/gemma-3-27b-it")
    assert str(caught.value).startswith(
        "model: google/gemma-3-27b-it has 51.1 GiB of weights, which do not fit the GPUs, with "
        "24.0, 20.0 GiB free: give each replica more or larger GPUs (gpus_per_replica)"
    )


def test_model_that_fits_neither_machine_nor_gpu_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_memory(shapes_of("12b"), 16 * GIB, "google/gemma-3-12b-it", "the GPU")
    assert str(caught.value) == (
        "model: google/gemma-3-12b-it has 22.7 GiB of weights, and the GPU has 16.0 GiB free: it "
        "would fit with quantization: bitsandbytes-8bit (12.7 GiB), bitsandbytes-4bit (8.3 GiB), "
        "torchao-int8 (12.7 GiB), torchao-int4 (9.2 GiB), fp8 (12.7 GiB); or in bfloat16 with a "
        "smaller size: 270m (0.5 GiB), 1b (1.9 GiB), 4b (8.0 GiB)"
    )
    require_memory(shapes_of("12b"), 23 * GIB, "google/gemma-3-12b-it", "the GPU")


def test_quantised_layers_are_shared_by_the_sizes_that_they_will_have() -> None:
    """27B in 4 bits is spread over two GPUs of 16 GB, which do not hold it in 16."""
    shapes = quantized_shapes(dummy_config("27b"), torch.bfloat16, "bitsandbytes-4bit")
    device_map = share_layers(shapes, [15 * GIB, 15 * GIB], "27b")
    assert set(device_map.values()) == {FIRST, SECOND}
