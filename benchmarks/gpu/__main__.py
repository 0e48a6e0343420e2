"""Everything that is claimed of a GPU, measured on one, in one command.

    python -m benchmarks.gpu --output results.json          # needs torch, transformers, accelerate
    python -m benchmarks.gpu --tiny                         # a rehearsal on any CPU

A part that fails is reported and the rest goes on; a part that may not fit ``--budget-s`` any more
is skipped and named. The table at the end has every number with its share of what the machine's
memory or its matrix units allow, which are measured first.
"""

import argparse
import sys
from collections.abc import Sequence as Seq
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.environment import write_json
from benchmarks.gpu.findings import Run
from benchmarks.gpu.measurements import PARTS, Measurements
from benchmarks.gpu.scale import FULL, TINY
from gemma_serve.gemma.config import ModelConfig
from gemma_serve.gemma.placement import place

_DEFAULT_BUDGET_S: Final = 840.0


def main(argv: Seq[str]) -> int:
    """Returns the exit status: 0 if every part was measured or skipped, 1 if one failed."""
    args = _parse(argv)
    scale = TINY if args.tiny else FULL
    placement = place(ModelConfig(device=args.device))
    device = placement.devices[0]
    if device.type != "cuda" and not args.tiny:
        print("there is no GPU here: rehearse with --tiny, or see --help", file=sys.stderr)
        return 1
    run = Run(args.budget_s)
    print(f"{_name(device)}, torch {torch.__version__}, at most {args.budget_s:.0f} s")
    Measurements(run, scale, placement, args.sizes or scale.sizes).measure(args.parts)
    run.print_table()
    if args.output is not None:
        write_json(args.output, {"device": _name(device), **_report(run)})
    return 1 if run.failed else 0


def _parse(argv: Seq[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: rehearse on a CPU")
    parser.add_argument("--budget-s", type=float, default=_DEFAULT_BUDGET_S)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--sizes", nargs="+", help="by default 27b, 4b and 12b")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    return parser.parse_args(argv)


def _report(run: Run) -> dict[str, Any]:
    return {
        "findings": [{**asdict(f), "met": f.met} for f in run.findings],
        "failed": run.failed,
        "skipped": run.skipped,
        "seconds": run.seconds,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
