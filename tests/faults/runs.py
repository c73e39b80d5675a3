"""A run under ``torchrun`` that can be killed, whole or in part, and what its folder holds. Linux only: needs /proc."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taylor_cuda.surgery import load
from taylor_cuda.train.models import DigitsResNet
from taylor_cuda.train.session import CHECKPOINTS, LOG, MODEL
from taylor_cuda.train.state import load_state

ROOT = Path(__file__).parent.parent.parent
MARK = "TAYLOR_CUDA_FAULTS"
"""A variable in the environment of all processes of a run, by which they are found, whoever started them."""
SUMMARY, PICTURE = "summary.json", "widths.svg"
RESULTS = [LOG, MODEL, SUMMARY, PICTURE]
PATIENCE = 300.0
"""Seconds after which a run is taken to hang."""


class EndedFirstError(Exception):
    """The run ended before it was to be killed."""


# -- a run, and its end ------------------------------------------------------------------------------------------------


class Run:
    """``torchrun`` and what it started.

    Args:
        arguments: of ``taylor-cuda prune``.
        out: folder it writes to.
        ranks: how many.
        restarts: how often ``torchrun`` starts the ranks anew.

    Attributes:
        output: file with what all of them printed.
    """

    def __init__(self, arguments: tuple[str, ...], out: Path, ranks: int = 2, restarts: int = 0) -> None:
        self.out, self.mark = out, uuid.uuid4().hex
        self.output = out.with_name(f"{out.name}.{self.mark[:8]}.txt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(restarts), "-m", "taylor_cuda", "prune", *arguments, "--out", str(out)]
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(self.output, "wb") as output:
            self._launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        self.started = time.monotonic()

    def processes(self) -> dict[int, int | None]:
        """``{process: its rank}``; ``None`` for ``torchrun`` itself."""
        found: dict[int, int | None] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                values = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or is another user's
            if f"{MARK}={self.mark}".encode() in values:
                ranks = [int(value[5:]) for value in values if value.startswith(b"RANK=")]
                found[int(folder.name)] = ranks[0] if ranks else None
        return found

    def wait_for(self, happened: Callable[[], bool], pause: float = 0.02) -> None:
        """Return as soon as something is so.

        Raises:
            EndedFirstError: the run ended before.
        """
        while not happened():
            if self._launcher.poll() is not None:
                raise EndedFirstError
            self._check_patience()
            time.sleep(pause)

    def wait(self) -> int:
        """Exit status of ``torchrun`` at its end."""
        while self._launcher.poll() is None:
            self._check_patience()
            time.sleep(0.05)
        return self._launcher.wait()

    def _check_patience(self) -> None:
        if time.monotonic() - self.started > PATIENCE:
            raise TimeoutError(f"still running after {PATIENCE:.0f} s")

    def victims(self, rank: int | None = None, launcher: bool = False) -> list[int]:
        """The process of one rank, or ``torchrun`` alone, or all of them, those that write first.

        Raises:
            EndedFirstError: there is none left.
        """
        found = self.processes()
        chosen = [process for process, of in found.items() if (of is None if launcher else rank in (None, of))]
        if not chosen:
            raise EndedFirstError
        return sorted(chosen, key=lambda process: (found[process] is None, found[process]))

    def wait_for_ranks(self) -> None:
        """Until the last of them has ended by itself."""
        while any(rank is not None for rank in self.processes().values()):
            self._check_patience()
            time.sleep(0.05)

    def end(self) -> None:
        """Leave no process behind."""
        while left := self.processes():
            kill(left)
            time.sleep(0.02)
            self._launcher.poll()
        self._launcher.wait()

    def text(self) -> str:
        """What was printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def kill(processes: Iterable[int]) -> None:
    """SIGKILL to each of them that is still there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextmanager
def running(arguments: tuple[str, ...], out: Path, ranks: int = 2, restarts: int = 0) -> Iterator[Run]:
    """A run of which nothing is left at the block's end."""
    run = Run(arguments, out, ranks, restarts)
    try:
        yield run
    finally:
        run.end()


def begun(out: Path) -> bool:
    """It has begun to train: all its processes are there."""
    return (out / LOG).is_file()


def writing(out: Path) -> bool:
    """A checkpoint is being written, at this very moment."""
    try:
        return any(name.endswith(".tmp") for name in os.listdir(out / CHECKPOINTS))
    except FileNotFoundError:
        return False


def checkpoints(out: Path) -> list[Path]:
    """Those that have their name, the newest first."""
    return sorted((out / CHECKPOINTS).glob("[0-9]*.pt"), reverse=True)


def reached(out: Path) -> int:
    """Minibatch of the newest checkpoint, 0 without one."""
    return max((int(path.name.partition("-")[0]) for path in checkpoints(out)), default=0)


# -- what is left ------------------------------------------------------------------------------------------------------


def damaged(out: Path, ended: bool) -> list[str]:
    """What can't be read, or shouldn't be there, in the folder of a run that was killed or has ended."""
    wrong = []
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            if ended:
                wrong.append(f"{name} was left")
            continue
        try:
            read(path)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    there = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    if ended and there != RESULTS:
        wrong.append(f"the folder holds {', '.join(there)}")
    return wrong


def read(path: Path) -> None:
    """Raise unless a file of a run is whole."""
    if path.parent.name == CHECKPOINTS:
        step, digest = re.fullmatch(r"(\d+)-([0-9a-f]{16})\.pt", path.name).groups()
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest), "its checksum differs"
        assert load_state(path, torch.device("cpu"))["taken"] == int(step)
    elif path.name == LOG:
        records(path.parent)
    elif path.name == MODEL:
        load(DigitsResNet(), path)
    elif path.name == SUMMARY:
        json.loads(path.read_text(encoding="utf-8"))
    elif path.name == PICTURE:
        xml.etree.ElementTree.parse(path)
    else:
        raise AssertionError("a run has no such file")


def records(out: Path) -> list[dict[str, Any]]:
    """The log."""
    text = (out / LOG).read_text(encoding="utf-8")
    assert not text or text.endswith("\n"), "the last line is not whole"
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    plans: list[str]
    steps: list[int]
    accuracy: float
    weights: dict[str, torch.Tensor]


def result_of(out: Path) -> Result:
    """Read it."""
    found = [record for record in records(out) if record["event"] == "prune"]
    accuracy = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["pruned_accuracy"]
    weights = load(DigitsResNet(), out / MODEL).state_dict()
    return Result([record["plan"] for record in found], [record["step"] for record in found], accuracy, weights)


def differences(found: Result, expected: Result) -> list[str]:
    """In what it is not the result that was to be."""
    wrong = []
    if (found.plans, found.steps) != (expected.plans, expected.steps):
        wrong.append(f"plans {[plan[:8] for plan in found.plans]}, not {[plan[:8] for plan in expected.plans]}")
    if not abs(found.accuracy - expected.accuracy) <= 0.005:
        wrong.append(f"accuracy {found.accuracy:.4f}, not {expected.accuracy:.4f}")
    return wrong


def bit_equal(found: Result, expected: Result) -> bool:
    """All weights and statistics are."""
    return found.weights.keys() == expected.weights.keys() and all(
        torch.equal(value, expected.weights[name]) for name, value in found.weights.items()
    )
