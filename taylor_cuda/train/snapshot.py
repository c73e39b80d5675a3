"""Everything a run needs to go on, out of a session's objects and back into them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.train.batch_norm import statistics_of
from taylor_cuda.train.shares import seed_of
from taylor_cuda.train.state import Position, generator_states, restore_generators
from taylor_cuda.train.summary import Measured

if TYPE_CHECKING:
    from taylor_cuda.train.session import Session


def state_of(session: Session) -> dict[str, Any]:
    """Tensors and plain values."""
    pruner, average, teacher, scaler = session.pruner, session.average, session.teacher, session.precision.scaler
    return {
        "config": session.identity(),
        "position": dataclasses.asdict(session.position),
        "taken": session.taken,
        "measured": dataclasses.asdict(dataclasses.replace(session.measured, seconds=session.seconds())),
        "log": session.log_file.flushed_size(),
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "average": None if average is None else average.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "pruner": None if pruner is None else pruner.state_dict(),
    }


def state_of_rank(session: Session) -> dict[str, Any]:
    """What differs over ranks: where random numbers stand, and BatchNorm's statistics, each of its own examples."""
    return {"generators": generator_states(), "statistics": [buffer.cpu() for buffer in _statistics(session)]}


def put_back(session: Session, state: dict[str, Any]) -> None:
    """Bring a session that was just made to where another one was in ``state_of``: the network is cut as it was.

    Raises:
        InputError: that one had other settings.
    """
    _check_same_run(session, state)
    session.position, session.measured = Position(**state["position"]), Measured(**state["measured"])
    session.taken = state["taken"]
    if state["pruner"] is not None:
        session.prepare_pruning().load_state_dict(state["pruner"])
        session.witness.follow(state["pruner"]["kept"])
    session.model.load_state_dict(state["model"])
    if state["pruner"] is not None or session.position.stage == "base":
        session.optimizer.load_state_dict(state["optimizer"])
    if state["average"] is None:
        session.average = None  # the network has taken it over
    parts = {"scaler": session.precision.scaler, "average": session.average, "teacher": session.teacher}
    for key, part in parts.items():
        if part is not None and state[key] is not None:
            part.load_state_dict(state[key])
    if session.launch.first:
        session.log_file.go_on(state["log"], session.taken)
    _put_back_rank(session, state["ranks"])


def _put_back_rank(session: Session, states: list[dict[str, Any]]) -> None:
    rank = session.launch.rank
    if len(states) == session.launch.ranks:
        restore_generators(states[rank]["generators"])
        for buffer, value in zip(_statistics(session), states[rank]["statistics"], strict=True):
            buffer.copy_(value)
    else:  # other ranks than then: any numbers will do, if they aren't those that were used
        torch.manual_seed(seed_of(session.config.seed + rank, session.taken))


def _statistics(session: Session) -> list[Tensor]:
    models = [session.model] if session.average is None else [session.model, session.average.module]
    return [buffer for model in models for buffer in statistics_of(model)]


def _check_same_run(session: Session, state: dict[str, Any]) -> None:
    then, now = state["config"], session.identity()
    other = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]]
    if other:
        raise InputError(f"resume: the state belongs to a run with other settings: {'; '.join(other)}")
