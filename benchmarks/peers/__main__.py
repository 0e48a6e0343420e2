"""``python -m benchmarks.peers install vllm llama.cpp``: the servers to compare with."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.installation import PEERS, default_folder, install, print_peers


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__)
    parser.add_argument("action", choices=["install", "list"])
    parser.add_argument("names", nargs="*", metavar="PEER", help=f"any of: {', '.join(PEERS)}")
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="default: %(default)s"
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="index with CPU builds of torch, such as https://download.pytorch.org/whl/cpu",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(PEERS)):
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if options.action == "install":
        for name in options.names or PEERS:
            try:
                install(options.folder, name, options.torch_index)
            except subprocess.CalledProcessError as failure:
                print(f"cannot install {name}: {failure}", file=sys.stderr)
                return 1
    print_peers(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
