import logging

import pytest
import torch

from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.placement import choose_devices, choose_dtype

T4, A100, H100 = (7, 5), (8, 0), (9, 0)


def test_auto_takes_all_gpus_or_the_cpu() -> None:
    assert choose_devices("auto", num_gpus=0) == (torch.device("cpu"),)
    assert choose_devices("auto", num_gpus=2) == (torch.device("cuda:0"), torch.device("cuda:1"))


def test_cpu_is_used_in_spite_of_gpus_when_asked_for() -> None:
    assert choose_devices("cpu", num_gpus=2) == (torch.device("cpu"),)


def test_cuda_without_a_gpu_is_refused_with_what_was_found() -> None:
    with pytest.raises(ConfigurationError, match=rf"torch {torch.__version__[:4]}.*sees no GPU"):
        choose_devices("cuda", num_gpus=0)


def test_auto_is_bfloat16_on_cpus_and_recent_gpus() -> None:
    assert choose_dtype("auto", []) is torch.bfloat16
    assert choose_dtype("auto", [A100, H100]) is torch.bfloat16


def test_auto_falls_back_to_float32_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_dtype("auto", [H100, T4]) is torch.float32
    assert "compute capability 7.5 has no bfloat16" in caplog.text


def test_bfloat16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="set dtype: float32"):
        choose_dtype("bfloat16", [T4])


def test_float32_is_taken_anywhere() -> None:
    assert choose_dtype("float32", [T4]) is torch.float32
