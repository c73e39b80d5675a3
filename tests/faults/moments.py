"""Moments at which a run is killed, and how it goes on from there."""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.runs import (
    SUMMARY,
    EndedFirstError,
    Result,
    Run,
    begun,
    checkpoints,
    damaged,
    differences,
    kill,
    reached,
    records,
    result_of,
    running,
    writing,
)


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed: its result, its minibatches, when its log began, and what each took from there.

    How fast a run is changes with what else the machine does, so moments are counted in minibatches.
    """

    result: Result
    minibatches: int
    begins: float
    each: float


@dataclass
class Moment:
    """When and how a run is killed.

    Attributes:
        when: share of all minibatches; below 0: share of the time before the log begins.
        rank: the one that is killed, which ``torchrun`` replaces; ``None``: all processes at once.
        launcher: only ``torchrun`` itself is killed; the ranks then have to end by themselves.
        writing: wait from then for the next moment in which a checkpoint is being written.
        again: when the resumed run is killed in its turn.
        cut: share of the newest checkpoint that is left of it after the kill.
        seen: what came of it, for the table.
    """

    when: float
    rank: int | None = None
    launcher: bool = False
    writing: bool = False
    again: float | None = None
    cut: float | None = None
    seen: list[str] = field(default_factory=list)

    @property
    def how(self) -> str:
        """For the table."""
        who = "torchrun" if self.launcher else "all" if self.rank is None else f"rank {self.rank}"
        return who + (" in a write" if self.writing else " twice" if self.again is not None else "")


EVERY = 3
"""Minibatches between checkpoints of the runs that are killed."""


def reference_run(arguments: tuple[str, ...], out: Path, ranks: int = 2) -> Reference:
    """Make it."""
    with running(arguments, out, ranks) as run:
        run.wait_for(lambda: begun(out))
        begins = time.monotonic() - run.started
        run.wait_for(lambda: (out / SUMMARY).is_file())
        lasts = time.monotonic() - run.started - begins
        status = run.wait()
        assert status == 0, run.text()
    assert not damaged(out, ended=True), damaged(out, ended=True)
    minibatches = records(out)[-1]["step"]
    return Reference(result_of(out), minibatches, begins, lasts / minibatches)


def kill_at(run: Run, moment: Moment, when: float, reference: Reference) -> None:
    """Wait for a moment of a run, and kill."""
    if when < 0:
        time.sleep(-when * reference.begins)
    else:
        run.wait_for(lambda: begun(run.out))
        until = when * reference.minibatches
        run.wait_for(lambda: reached(run.out) + EVERY > until)
        time.sleep(max(0.0, until - reached(run.out)) * reference.each)
    if moment.rank is not None:
        run.wait_for(lambda: moment.rank in run.processes().values())
    victims = run.victims(moment.rank, moment.launcher)
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
            if moment.launcher:
                run.wait_for_ranks()
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
    nothing_left = "it had ended" if (out / SUMMARY).is_file() else "from the start"
    where = f"from {int(there[0].name[:8])}" if there else nothing_left
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
        ("all", "all in a write", "rank", "all twice", "torchrun", "rank in a write", "all, cut", "all", "rank")
    )
    found = []
    for number, kind in zip(range(count), kinds, strict=False):
        when = -choose.random() if number == 0 and count > 2 else (number + choose.random()) / count
        found.append(
            Moment(
                when,
                rank=choose.randrange(ranks) if kind.startswith("rank") else None,
                launcher=kind == "torchrun",
                writing=kind.endswith("write"),
                again=when + choose.random() * (1 - when) if kind == "all twice" else None,
                cut=choose.random() if kind == "all, cut" else None,
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
            moment.when, moment.again = 0.9 * moment.when, None if moment.again is None else 0.9 * moment.again
            continue
        except (AssertionError, TimeoutError) as error:
            return None, str(error)
        return found, "; ".join(differences(found, reference.result))
    return None, "every try ended before it was killed"
