"""``taylor-cuda``: finds the command, runs it, and turns errors meant for people into a line and an exit code."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

import taylor_cuda
from taylor_cuda.cli import bench, compare, doctor, info, prune
from taylor_cuda.errors import TaylorError
from taylor_cuda.train.launch import rank_of_environment
from taylor_cuda.train.stopping import RunInterruptedError

FAILED, INTERRUPTED = 2, 130
COMMANDS = (prune, doctor, compare, bench, info)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="taylor-cuda", description="Prune networks by Taylor importance, scored while they train."
    )
    root.add_argument("--version", action="version", version=f"taylor-cuda {taylor_cuda.__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program's name; ``None`` takes them from there.

    Returns:
        0; 2 for anything that was asked for wrongly or can't be done; 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(given)
    except SystemExit as stop:  # argparse has already said why
        return stop.code if isinstance(stop.code, int) else FAILED
    try:
        return int(options.run(options))
    except RunInterruptedError as interrupted:
        again = given if "--resume" in given else [*given, "--resume"]
        rank, ranks = rank_of_environment()
        program = "taylor-cuda" if ranks == 1 else "torchrun … -m taylor_cuda"
        if rank == 0:
            _say(f"{interrupted}; go on with: {program} {shlex.join(again)}")
        return INTERRUPTED
    except KeyboardInterrupt:
        _say("interrupted before there was anything to save")
        return INTERRUPTED
    except (TaylorError, OSError) as error:
        _say(f"error: {error}")
        return FAILED


def _say(message: str) -> None:
    rank, ranks = rank_of_environment()
    who = f"taylor-cuda, rank {rank}" if ranks > 1 else "taylor-cuda"
    print(f"{who}: {message}", file=sys.stderr)
