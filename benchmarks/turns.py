"""The course of a comparison: each contender in turn, its workloads, round after round."""

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import httpx

from benchmarks.chat_client import find_model
from benchmarks.comparison import CaseResult
from benchmarks.contenders import ROOT, Contender, Kind, Start, checkpoint, contenders
from benchmarks.memory_bandwidth import measure_read_bandwidth
from benchmarks.server_process import ServerStartError, free_port, running_server
from benchmarks.serving_metrics import LevelSummary, summarise
from benchmarks.targets import HttpTarget, Target
from benchmarks.workloads import TEXT_WORKLOADS, WORKLOADS, Scale, Workload

GENERATE: Final = "generate"
"""The contender that is no server: transformers in this process."""
GENERATE_WORKLOADS: Final = ("decode", "long-prompts")
"""Those without a second request that depends on the first."""
REQUEST_TIMEOUT_S: Final = 900.0
"""Between two chunks; the longest prompt takes minutes on a slow server."""
WARMUP: Final = Scale(streams=(1, 2), decode_words=50, decode_tokens=8)


@dataclass(frozen=True, slots=True)
class Turn:
    """One start of one contender: what the machine was like, and how long it took to be ready."""

    contender: str
    kind: Kind
    bandwidth_gb_per_s: float | None = None
    startup_s: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and where to leave the servers' logs."""

    contenders: tuple[str, ...]
    endpoints: tuple[tuple[str, str], ...]
    """Names and URLs, up to /v1, of servers that run already and know ``ignore_eos``."""
    workloads: tuple[str, ...]
    scale: Scale
    rounds: int
    passes: int
    """Starts of each contender."""
    seed: int
    peers: Path
    logs: Path
    startup_timeout_s: float


@dataclass(slots=True)
class Run:
    """A comparison under way. Owned by ``compare``."""

    plan: Plan
    turns: list[Turn] = field(default_factory=list)
    results: list[CaseResult] = field(default_factory=list)


async def compare(run: Run) -> None:
    """Give every contender its turn, as often as there are passes."""
    known = contenders(run.plan.peers)
    for pass_index in range(run.plan.passes):
        for name in run.plan.contenders:
            for kind in _kinds(run, known.get(name)):
                await _take_turn(run, name, known.get(name), kind, pass_index)
        for name, url in run.plan.endpoints:
            async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
                target = HttpTarget(client, await find_model(client), {"ignore_eos": True})
                await _measure(run, name, target, _workloads(run, "text"), pass_index)


def _kinds(run: Run, contender: Contender | None) -> list[Kind]:
    """The models that the asked workloads and the contender have in common."""
    kinds: list[Kind] = []
    if any(name in TEXT_WORKLOADS for name in run.plan.workloads):
        kinds.append("text")
    if "image-chat" in run.plan.workloads and contender and "vision" in contender.kinds:
        kinds.append("vision")
    return kinds


def _workloads(run: Run, kind: Kind) -> dict[str, Workload]:
    asked = run.plan.workloads
    return {
        name: workload
        for name, workload in WORKLOADS.items()
        if name in asked and (name in TEXT_WORKLOADS) == (kind == "text")
    }


async def _take_turn(
    run: Run, name: str, contender: Contender | None, kind: Kind, pass_index: int
) -> None:
    if contender is not None and not contender.is_available:
        error = f"it is not installed: {contender.how_to_get}"
        _say(f"{name}: {error}")
        run.turns.append(Turn(name, kind, error=error))
        return
    bandwidth = measure_read_bandwidth() / 1e9
    _say(f"{name} ({kind}): starting; this machine reads {bandwidth:.1f} GB/s now")
    turn = Turn(name, kind, bandwidth)
    try:
        if contender is None:
            await _measure_generate(run, pass_index)
        else:
            async with serving(run, contender, kind) as (target, startup_s):
                turn = replace(turn, startup_s=startup_s)
                await _measure(run, name, target, _workloads(run, kind), pass_index)
    except ServerStartError as failure:
        _say(f"{name}: cannot be measured: {failure}")
        turn = replace(turn, error=str(failure))
    finally:
        run.turns.append(turn)


async def _measure_generate(run: Run, pass_index: int) -> None:
    from benchmarks.generate_target import GenerateTarget  # loads transformers

    asked = _workloads(run, "text").items()
    workloads = {name: workload for name, workload in asked if name in GENERATE_WORKLOADS}
    await _measure(run, GENERATE, GenerateTarget(checkpoint("text")), workloads, pass_index)


@asynccontextmanager
async def serving(
    run: Run, contender: Contender, kind: Kind
) -> AsyncIterator[tuple[Target, float]]:
    """Start ``contender``; yield it with the seconds that it took. Raises ``ServerStartError``."""
    with tempfile.TemporaryDirectory(prefix="gemma-serve-bench-") as folder:
        start = Start(free_port(), kind, Path(folder))
        root = f"http://127.0.0.1:{start.port}"
        async with (
            running_server(
                contender.command(start),
                environment=contender.environment,
                folder=ROOT,
                log=run.plan.logs / f"{contender.name}-{kind}.log",
                health_url=f"{root}/health",
                timeout_s=run.plan.startup_timeout_s,
            ) as startup_s,
            httpx.AsyncClient(
                base_url=f"{root}/v1/",
                timeout=REQUEST_TIMEOUT_S,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            ) as client,
        ):
            target = HttpTarget(client, contender.model_name(kind), contender.extra_body)
            yield target, startup_s


async def _measure(
    run: Run, name: str, target: Target, workloads: dict[str, Workload], pass_index: int
) -> None:
    """Warm up, then all rounds. Each joins what was measured at once, in case it is the last."""
    warmup = WORKLOADS["decode"](target, WARMUP, f"{run.plan.seed}-{pass_index}-w")
    async for _ in warmup:
        pass
    for index in range(run.plan.rounds):
        # The same for all contenders, and in no cache.
        salt = f"{run.plan.seed}-{pass_index}-{index}"
        for workload in workloads.values():
            async for case, records in workload(target, run.plan.scale, salt):
                summary = summarise(len(records), records)
                _add(run, CaseResult(name, case, (summary,)))
                _say(f"{name}, round {index + 1}, {case.workload}, {case.label}: {_brief(summary)}")


def _add(run: Run, result: CaseResult) -> None:
    for index, earlier in enumerate(run.results):
        if (earlier.contender, earlier.case) == (result.contender, result.case):
            run.results[index] = replace(earlier, rounds=earlier.rounds + result.rounds)
            return
    run.results.append(result)


def _brief(summary: LevelSummary) -> str:
    if summary.errors:
        return f"{summary.num_errors} failed: {next(iter(summary.errors))}"
    ttft = summary.time_to_first_token.p50_ms
    return f"{summary.output_tokens_per_s:.1f} tok/s, TTFT {ttft or 0:.0f} ms"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
