"""``python -m taylor_cuda.bench.coverage``: examine every network, append the rows, write the table."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from taylor_cuda.bench.coverage import ours, peer
from taylor_cuda.bench.coverage.networks import NETWORKS, SHORT, Network
from taylor_cuda.bench.coverage.outcome import Outcome, shortcomings
from taylor_cuda.bench.coverage.table import append, markdown
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.rows import RESULTS, read_rows
from taylor_cuda.bench.suites.peers import installed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when no row of ours falls short."""
    asked = _parser().parse_args(arguments)
    if asked.peer:
        print(peer.as_json(peer.examine(next(one for one in NETWORKS if one.name == asked.peer))))
        return 0
    # a quick run is for seeing that everything works: its figures go nowhere unless a folder was named
    results: Path | None = asked.results or (None if asked.quick else RESULTS)
    networks = [one for one in (SHORT if asked.quick else NETWORKS) if not asked.networks or one.name in asked.networks]
    beside = not (asked.quick or asked.ours_only) and installed("torch_pruning") is not None
    record, short = environment("cpu"), []
    for network in networks:
        found = examine(network, beside)
        if results is not None:
            append([outcome.row(record) for outcome in found], results)
        short += [f"{network.name}: {text}" for outcome in found[:1] for text in shortcomings(outcome)]
    if results is not None:
        path = results / "coverage.md"
        path.write_text(markdown(read_rows(results), [one.name for one in NETWORKS]), encoding="utf-8")
        print(f"written: {path}")
    print("\n".join(short) or "no row of ours falls short")
    return 1 if short else 0


def examine(network: Network, beside: bool) -> list[Outcome]:
    """Our row, and Torch-Pruning's where it is asked for; printed. None where the network's package is missing."""
    found: list[Outcome] = []
    if network.source != "own" and installed(network.source) is None:
        print(f"{network.name:22}left out: {network.source} isn't installed")
        return found
    for provider in (ours.examine, peer.examine_apart) if beside else (ours.examine,):
        outcome = provider(network)
        found.append(outcome)
        figures = [
            f"{name} {value:.3g}"
            for name in ("seconds", "share", "macs", "difference", "verified", "effect")
            if (value := getattr(outcome, name)) is not None
        ]
        print(f"{outcome.case:22}{outcome.provider:15}{outcome.verdict:10}{', '.join(figures)}  {outcome.note[:200]}")
        sys.stdout.flush()
        gc.collect()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m taylor_cuda.bench.coverage", description="What can be pruned of which network"
    )
    names = [one.name for one in NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--quick", action="store_true", help="a few small networks, ours only; rows with --results only"
    )
    parser.add_argument("--ours-only", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write under this folder (default: bench/results)")
    parser.add_argument("--peer", choices=names, metavar="NAME", help="only print Torch-Pruning's row of one network")
    return parser


if __name__ == "__main__":
    sys.exit(main())
