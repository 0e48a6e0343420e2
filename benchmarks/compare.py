"""gemma-serve beside other servers: the same model, prompts and lengths, one machine, one run.

    python -m benchmarks.compare                      # quick: minutes
    python -m benchmarks.compare --scale full         # every workload at its size: hours on a CPU
    python -m benchmarks.compare --contenders gemma-serve vllm --workloads decode

Each server in turn is started on a port of its own, warmed up, measured for several rounds and
stopped. The results go to the terminal, a JSON file with every round, and plots.
"""

import argparse
import asyncio
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from benchmarks.comparison import (
    METRICS,
    CaseResult,
    cold_shares,
    decode_bounds,
    format_bounds,
    format_results,
    format_shares,
)
from benchmarks.contenders import ROOT, contenders
from benchmarks.environment import write_json
from benchmarks.peers.installation import default_folder
from benchmarks.turns import GENERATE, Plan, Run, compare
from benchmarks.workloads import TEXT_WORKLOADS, WORKLOADS, Scale

WEIGHT_BYTES: Final = 536_223_056
"""Of the demo model in bfloat16, its 335 MB of tied embeddings included: every step reads all."""
QUICK: Final = Scale(
    streams=(1, 8),
    history_words=1000,
    prefix_words=2000,
    prefix_users=2,
    prompt_words=(128, 512, 2048),
    short_chats=32,
)
SMOKE: Final = Scale(
    streams=(1, 2),
    decode_words=20,
    decode_tokens=8,
    history_words=100,
    prefix_words=200,
    prefix_users=1,
    prompt_words=(32, 128),
    short_chats=4,
)
"""To see that everything starts and answers; its numbers mean nothing."""
SCALES: Final = {"smoke": SMOKE, "quick": QUICK, "full": Scale()}


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(make_plan(options))
    try:
        asyncio.run(compare(run))
    except KeyboardInterrupt:
        print("stopped early: this is what was measured until then", file=sys.stderr)
        report(run, options.out)
        return 128 + signal.SIGINT
    report(run, options.out)
    return 1 if any(turn.error for turn in run.turns) else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help="default: gemma-serve, generate, and every server that is installed",
    )
    parser.add_argument(
        "--endpoint",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a server that runs already, up to /v1; it must know ignore_eos",
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(TEXT_WORKLOADS))
    parser.add_argument("--scale", choices=SCALES, default="quick")
    parser.add_argument("--streams", type=int, nargs="+", help="of decode; default: the scale's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="starts of every server in turn")
    parser.add_argument("--peers", type=Path, default=default_folder(), help="default: %(default)s")
    parser.add_argument("--startup-timeout-s", type=float, default=900)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**31), help="of the prompts; default: new"
    )
    date = datetime.now(UTC).strftime("%Y-%m-%d-%H%M")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench" / date)
    options = parser.parse_args(arguments)
    known = (GENERATE, *contenders(options.peers))
    if options.contenders is None and not options.endpoint:
        options.contenders = default_contenders(options.peers)
    if unknown := sorted(set(options.contenders or ()) - set(known)):
        parser.error(f"unknown contenders: {', '.join(unknown)}; there are {', '.join(known)}")
    if wrong := [endpoint for endpoint in options.endpoint if "=" not in endpoint]:
        parser.error(f"--endpoint must be NAME=URL, got {wrong[0]}")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    scale: Scale = SCALES[options.scale]
    return Plan(
        contenders=tuple(options.contenders or ()),
        endpoints=tuple(
            (name, url) for name, _, url in (e.partition("=") for e in options.endpoint)
        ),
        workloads=tuple(options.workloads),
        scale=replace(scale, streams=tuple(options.streams or scale.streams)),
        rounds=options.rounds,
        passes=options.passes,
        seed=options.seed,
        peers=options.peers,
        logs=options.out,
        startup_timeout_s=options.startup_timeout_s,
    )


def default_contenders(peers: Path) -> list[str]:
    """Ours, ``generate``, and the servers that are installed."""
    available = [name for name, c in contenders(peers).items() if c.is_available]
    return [available[0], GENERATE, *available[1:]]


def report(run: Run, out: Path) -> None:
    """Print the tables; write JSON and plots."""
    print("\nMedians of the rounds; latencies in ms.\n")
    print(format_results(run.results))
    if shares := cold_shares(run.results):
        print(f"\n{format_shares(shares)}")
    if bandwidths := [turn.bandwidth_gb_per_s for turn in run.turns if turn.bandwidth_gb_per_s]:
        bandwidth = max(bandwidths)
        bound_ms = WEIGHT_BYTES / bandwidth / 1e6
        print(f"\nReading the weights once at {bandwidth:.1f} GB/s takes {bound_ms:.1f} ms.\n")
        if bounds := decode_bounds(run.results, bound_ms):
            print(f"{format_bounds(bounds)}\n")
    write_json(out / "comparison.json", as_json(run))
    plot(run.results, out)


def as_json(run: Run) -> dict[str, Any]:
    """Everything that was measured, round by round."""
    plan = asdict(run.plan)
    del plan["peers"], plan["logs"]  # of this machine
    shares = cold_shares(run.results)
    return {
        "plan": plan,
        "weight_bytes": WEIGHT_BYTES,
        "turns": [asdict(turn) for turn in run.turns],
        "warm_over_cold_ttft": {f"{name} {workload}": x for (name, workload), x in shares.items()},
        "results": [
            {
                "contender": result.contender,
                **asdict(result.case),
                "over_rounds": {
                    name: asdict(spread)
                    for name, metric in METRICS.items()
                    if (spread := result.spread(metric)) is not None
                },
                "rounds": [asdict(level) for level in result.rounds],
            }
            for result in run.results
        ],
    }


def plot(results: Sequence[CaseResult], out: Path) -> None:
    try:
        from benchmarks.plots import plot_throughput, plot_ttft
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing.name} is not installed (pip install 'gemma-serve[bench]')")
        return
    measured = {result.case.workload for result in results}
    for workload, draw, name in (
        ("decode", plot_throughput, "throughput.png"),
        ("long-prompts", plot_ttft, "ttft.png"),
    ):
        if workload in measured:
            draw(results, out / name)
            print(f"wrote {out / name}")


if __name__ == "__main__":
    # Also when started in the background: the server under way must not outlive this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
