"""The command for a GPU box, as far as a CPU can run it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import models, parity, work
from benchmarks.gpu.bounds import ModelCosts
from benchmarks.gpu.findings import Finding, Run, Target
from benchmarks.gpu.scale import TINY
from gemma_serve.gemma.attention.reference import ReferenceAttention
from gemma_serve.gemma.engine_builder import build_engine
from gemma_serve.gemma.kv_cache import CacheLayout

CPU = torch.device("cpu")


def finding(value: float = 1.0) -> Finding:
    return Finding(what="x", value=value, unit="s")


def test_part_that_fails_keeps_what_it_found_and_the_next_part_is_measured() -> None:
    def fails() -> Iterator[Finding]:
        yield finding(1.0)
        raise ValueError("broken\nin detail")

    run = Run(budget_s=100)
    run.part("first", 1, fails)
    run.part("second", 1, lambda: [finding(2.0)])
    assert [f.value for f in run.findings] == [1.0, 2.0]
    assert run.failed == {"first": "ValueError: broken"}


def test_part_that_may_take_longer_than_is_left_is_skipped_and_named() -> None:
    run = Run(budget_s=5)
    run.part("long", 60, lambda: [finding()])
    run.part("short", 1, lambda: [finding()])
    assert len(run.findings) == 1
    assert run.skipped == ["long: may take 60 s, 5 s are left"]


def test_targets_are_for_the_share_where_there_is_one() -> None:
    half = Target(limit=0.5)
    assert Finding(what="x", value=9.0, unit="", share=0.4, target=half).met is False
    assert Finding(what="x", value=0.1, unit="", share=0.5, target=half).met is True
    at_most = Target(limit=2.0, direction="at most")
    assert Finding(what="x", value=2.1, unit="", target=at_most).met is False
    assert finding().met is None
    row = Finding(what="x", value=2.1, unit="times", target=at_most).row()
    assert row.split() == ["x", "2.1", "times", "NOT", "≤", "2"]


def test_bytes_and_operations_of_a_step_follow_from_the_shapes() -> None:
    gemma = models.load(models.TINY, "cpu")
    costs = ModelCosts.of(gemma)
    per_layer = 64 * (4 + 2 + 2) * 32 + 4 * 32 * 64 + 3 * 64 * 128
    assert costs.matrix_parameters == 6 * per_layer
    num_norms = 6 * (4 * 64 + 2 * 32) + 64
    assert costs.weights_bytes == 2 * (1024 * 64 + 6 * per_layer + num_norms)
    # Of 100 tokens, five layers see 32 and one sees all; keys and values of two heads of 32.
    assert costs.decode_bytes(3, 100) - costs.weights_bytes == 3 * (5 * 32 + 100) * 2 * 2 * 32 * 2
    pairs = 100 * 101 // 2 + 5 * (32 * 33 // 2 + 68 * 32)
    assert costs.prefill_flops(100) == 2 * costs.matrix_parameters * 100 + pairs * 4 * 4 * 32


def test_streams_decode_together_and_leave_the_engine_idle() -> None:
    gemma = models.load(models.TINY, "cpu")
    engine = build_engine(gemma, models.engine_config(TINY))
    streams = work.prompts(3, 40, 1024)  # more than one chunk together
    assert work.decode_step_s(engine, streams, num_steps=3) > 0
    assert not engine.has_work
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    assert work.burst_rate(engine, streams, max_tokens=2) > 0


class ShortSighted(ReferenceAttention):
    """Sees one token less than the window."""

    def _window(self, layer: int) -> int | None:
        window = super()._window(layer)
        return None if window is None else window - 1


def layout_of_tiny() -> CacheLayout:
    return CacheLayout.of(models.TINY_CONFIG, [CPU] * 6, torch.float32)


@pytest.mark.parametrize("case", ["decode", "prefill", "images", "mixed"])
def test_parity_tells_a_window_that_is_off_by_one(case: str) -> None:
    spans = parity.cases(32)[case]
    layout = layout_of_tiny()
    assert parity.largest_error(ReferenceAttention, layout, torch.float32, 4, spans) == 0
    assert parity.largest_error(ShortSighted, layout, torch.float32, 4, spans) > 0.05


def test_parity_tells_an_image_that_is_read_as_text() -> None:
    class Blind(ReferenceAttention):
        def _attend_chunk(self, chunk, *args) -> Tensor:  # type: ignore[no-untyped-def]
            return super()._attend_chunk(replace(chunk, images=()), *args)

    error = parity.largest_error(
        Blind, layout_of_tiny(), torch.float32, 4, parity.cases(32)["images"]
    )
    assert error > 0.05


def test_parity_tells_a_number_that_is_none() -> None:
    class Broken(ReferenceAttention):
        def _attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
            return super()._attend(layer, query, scale) * float("nan")

    error = parity.largest_error(
        Broken, layout_of_tiny(), torch.float32, 4, parity.cases(32)["decode"]
    )
    assert not error <= 0.05


def test_a_box_with_torch_and_transformers_alone_will_do() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'fastapi', 'pydantic', 'starlette', 'uvicorn', 'httpx'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.gpu.__main__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_rehearsal_measures_every_part(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(output)]
    subprocess.run(command, check=True)
    results = json.loads(output.read_text())
    assert results["failed"] == {}
    found = " ".join(finding["what"] for finding in results["findings"])
    for part in ("attention", "host work", "decode", "prefill", "p99", "burst", "generate"):
        assert part in found
