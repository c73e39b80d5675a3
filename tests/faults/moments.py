"""Moments at which a run is killed, and how it goes on from there."""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.runs import (
    EndedFirstError,
    Result,
    Run,
    begun,
    checkpoints,
    damaged,
    differences,
    kill,
    result_of,
    running,
    writing,
)


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed: its result, when its log began, and how long it took from there."""

    result: Result
    begins: float
    lasts: float


@dataclass
class Moment:
    """When and how a run is killed.

    Attributes:
        when: share of the time that the run takes from when its log begins; below 0: of the time before.
        rank: the one that is killed, which ``torchrun`` replaces; ``None``: all processes at once.
        writing: wait from then for the next moment in which a checkpoint is being written.
        again: when the resumed run is killed in its turn.
        cut: share of the newest checkpoint that is left of it after the kill.
        seen: what came of it, for the table.
    """

    when: float
    rank: int | None = None
    writing: bool = False
    again: float | None = None
    cut: float | None = None
    seen: list[str] = field(default_factory=list)

    @property
    def how(self) -> str:
        """For the table."""
        who = "all" if self.rank is None else f"rank {self.rank}"
        return who + (" in a write" if self.writing else " twice" if self.again is not None else "")


def reference_run(arguments: tuple[str, ...], out: Path, ranks: int = 2) -> Reference:
    """Make it."""
    with running(arguments, out, ranks) as run:
        run.wait_for(lambda: begun(out))
        begins = time.monotonic() - run.started
        status = run.wait()
        lasts = time.monotonic() - run.started - begins
        assert status == 0, run.text()
    assert not damaged(out, ended=True), damaged(out, ended=True)
    return Reference(result_of(out), begins, lasts)


def kill_at(run: Run, moment: Moment, when: float, reference: Reference) -> None:
    """Wait for a moment of a run, and kill."""
    if when < 0:
        time.sleep(-when * reference.begins)
    else:
        run.wait_for(lambda: begun(run.out))
        until = time.monotonic() + when * reference.lasts
        run.wait_for(lambda: time.monotonic() >= until)
    if moment.rank is not None:
        run.wait_for(lambda: moment.rank in run.processes().values())
    victims = run.victims(moment.rank)
    if moment.writing:
        run.wait_for(lambda: writing(run.out), pause=0.0005)
    kill(victims)


def go_through(arguments: tuple[str, ...], out: Path, moment: Moment, reference: Reference, ranks: int = 2) -> Result:
    """Kill a run at a moment and let it go on to its end.

    Raises:
        EndedFirstError: it ended before.
        AssertionError: something was damaged, or it did not go on.
    """
    if moment.rank is not None:
        with running(arguments, out, ranks, restarts=1) as run:
            kill_at(run, moment, moment.when, reference)
            moment.seen.append(from_where(out))
            status = run.wait()
            assert status == 0, f"status {status} with --max-restarts 1:\n{run.text()}"
    else:
        with running(arguments, out, ranks) as run:
            kill_at(run, moment, moment.when, reference)
        check_what_is_left(out, moment)
        if moment.again is not None:
            with running(arguments, out, ranks) as run:
                kill_at(run, Moment(0), moment.again, reference)
            check_what_is_left(out, moment)
        cut = moment.cut is not None and cut_newest(out, moment)
        with running(arguments, out, ranks) as run:
            status = run.wait()
            assert status == 0, f"status {status} with --resume auto:\n{run.text()}"
            assert not cut or "is damaged (its checksum differs); trying the one before" in run.text(), "no warning"
    wrong = damaged(out, ended=True)
    assert not wrong, "; ".join(wrong)
    return result_of(out)


def check_what_is_left(out: Path, moment: Moment) -> None:
    """Right after a kill."""
    wrong = damaged(out, ended=False)
    assert not wrong, "; ".join(wrong)
    moment.seen.append(from_where(out))


def from_where(out: Path) -> str:
    """The minibatch after which it goes on, and whether there is a file half written."""
    there = checkpoints(out)
    where = f"from {int(there[0].name[:8])}" if there else "from the start"
    return f"{where}, half a file beside it" if writing(out) else where


def cut_newest(out: Path, moment: Moment) -> bool:
    """Truncate the newest checkpoint; there may be none yet."""
    there = checkpoints(out)
    if there:
        os.truncate(there[0], int(moment.cut * there[0].stat().st_size))
        moment.seen.append(f"{moment.cut:.0%} of it left")
    return bool(there)


def moments_of(count: int, ranks: int, seed: int) -> list[Moment]:
    """Spread over the whole run, and of every kind: a random one in each of ``count`` equal stretches of time."""
    choose = random.Random(seed)
    kinds = itertools.cycle(
        ("all", "all in a write", "rank", "all twice", "all", "rank in a write", "all, cut", "rank")
    )
    found = []
    for number, kind in zip(range(count), kinds, strict=False):
        when = -choose.random() if number == 0 and count > 2 else (number + choose.random()) / count
        found.append(
            Moment(
                when,
                choose.randrange(ranks) if kind.startswith("rank") else None,
                kind.endswith("write"),
                choose.random() * (1 - max(0, when)) if kind == "all twice" else None,
                choose.random() if kind == "all, cut" else None,
            )
        )
    return found


def one_moment(
    arguments: tuple[str, ...], folder: Path, number: int, moment: Moment, reference: Reference, ranks: int
) -> tuple[Result | None, str]:
    """Its result, and what went wrong. A run that was faster than the reference is killed a little earlier."""
    for attempt in range(5):
        moment.seen.clear()
        try:
            found = go_through(arguments, folder / f"{number}-{attempt}", moment, reference, ranks)
        except EndedFirstError:
            moment.when, moment.again = 0.8 * moment.when, None if moment.again is None else 0.6 * moment.again
            continue
        except (AssertionError, TimeoutError) as error:
            return None, str(error)
        return found, "; ".join(differences(found, reference.result))
    return None, "every try ended before it was killed"
