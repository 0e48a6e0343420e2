"""What a machine must have for each kind, and what is said where it has not."""

import pytest
import torch

from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.config import Quantization
from gemma_serve.gemma.placement import ComputeCapability, Placement
from gemma_serve.gemma.quantization.kinds import KINDS, installed_version, require_kind

CPU = Placement((torch.device("cpu"),), torch.bfloat16)
NEWEST = {"bitsandbytes": "0.50.2", "torchao": "0.18.0"}.get


def gpus(*capabilities: ComputeCapability, dtype: torch.dtype = torch.bfloat16) -> Placement:
    devices = tuple(torch.device("cuda", index) for index in range(len(capabilities)))
    return Placement(devices, dtype, capabilities)


def refusal(quantization: Quantization, placement: Placement) -> str:
    with pytest.raises(ConfigurationError) as caught:
        require_kind(quantization, placement, installed=NEWEST)
    return str(caught.value)


@pytest.mark.parametrize("quantization", ["none", *KINDS])
def test_a_hopper_gpu_with_every_package_takes_every_kind(quantization: Quantization) -> None:
    require_kind(quantization, gpus((9, 0)), installed=NEWEST)


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_fp8_is_for_ada_and_later(capability: ComputeCapability) -> None:
    require_kind("fp8", gpus(capability), installed=NEWEST)


def test_fp8_on_an_older_gpu_is_refused_with_what_would_do() -> None:
    assert refusal("fp8", gpus((9, 0), (8, 6))) == (
        "quantization: fp8 needs GPUs of compute capability 8.9 or later, and one has 8.6: use one "
        "of bitsandbytes-8bit, bitsandbytes-4bit, torchao-int8, torchao-int4 here, or leave it out"
    )


@pytest.mark.parametrize("quantization", ["fp8", "torchao-int4"])
def test_kinds_for_gpus_are_refused_on_a_cpu(quantization: Quantization) -> None:
    message = refusal(quantization, CPU)
    assert (
        "and the model runs on the CPU: use one of bitsandbytes-8bit, bitsandbytes-4bit" in message
    )
    assert "torchao-int4" not in message.partition("use one of")[2]


@pytest.mark.parametrize("quantization", ["torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_the_others_run_on_cpus_and_on_old_gpus_in_float32(quantization: Quantization) -> None:
    require_kind(quantization, CPU, installed=NEWEST)
    require_kind(quantization, gpus((7, 5), dtype=torch.float32), installed=NEWEST)


def test_kernels_for_bfloat16_alone_are_refused_with_float32() -> None:
    message = refusal("torchao-int4", gpus((8, 0), dtype=torch.float32))
    assert "computes in bfloat16, and dtype is float32" in message


@pytest.mark.parametrize(
    ("quantization", "package"),
    [("torchao-int8", "torchao"), ("bitsandbytes-4bit", "bitsandbytes")],
)
def test_missing_package_is_named_with_the_line_to_type(
    quantization: Quantization, package: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        require_kind(quantization, CPU, installed=lambda _: None)
    assert str(caught.value) == (
        f"quantization: {quantization} needs the package {package}: "
        "pip install 'gemma-serve[quantization]'"
    )


@pytest.mark.parametrize("version", ["0.9.1", "0.16.9"])
def test_old_package_is_named_with_its_version(version: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"torchao 0.17 or later, and {version} is inst"):
        require_kind("torchao-int8", CPU, installed=lambda _: version)


def test_fp8_and_none_need_no_package() -> None:
    require_kind("fp8", gpus((9, 0)), installed=lambda _: None)
    require_kind("none", CPU, installed=lambda _: None)


def test_installed_versions_are_looked_up() -> None:
    assert installed_version("torch") is not None
    assert installed_version("no-such-package-at-all") is None
