import pytest
import torch

from gemma_serve.gemma.out_of_memory import memory_errors


def test_a_cpu_without_that_much_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="can't allocate memory"), memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_all_words_of_a_gpu_are_a_memory_error(error: RuntimeError) -> None:
    with pytest.raises(MemoryError), memory_errors():
        raise error


def test_any_other_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"), memory_errors():
        raise RuntimeError("CUDA error: device-side assert triggered")
