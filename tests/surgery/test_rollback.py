"""Whatever is raised in a cut, and wherever: everything is as it was before, bit for bit."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import taylor_cuda.surgery
from taylor_cuda.errors import CutError
from taylor_cuda.graph import slicing
from taylor_cuda.surgery import apply_recipe, cut, load, save, shrink
from taylor_cuda.surgery.transaction import Transaction, set_data
from taylor_cuda.surgery.verify import MaskedReference
from tests.surgery.nets import ConvBN, Residual, make, random_keep, train_steps
from tests.surgery.state import differences, fingerprint

cut_module = importlib.import_module("taylor_cuda.surgery.cut")
WATCHED = {str(path) for path in Path(taylor_cuda.surgery.__file__).parent.glob("*.py")} | {slicing.__file__}


class BoomError(Exception):
    pass


def training_run(net=Residual) -> tuple[nn.Module, Any, torch.optim.Optimizer, nn.Module, dict[str, torch.Tensor]]:
    model, x, groups = make(net)
    model.train()
    model.head.eval()
    ema = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    train_steps(model, x, optimizer, 2)
    groups.notes.append("traced")
    return model, groups, optimizer, ema, random_keep(groups, 2)


STAGES = {
    "masked forward": (MaskedReference, "_forward"),
    "slicing a tensor": (shrink, "slice_tensor"),
    "replacing data": (shrink, "set_data"),
    "optimizer state": (shrink, "_slice_state"),
    "sizes of layers": (shrink, "update_attributes"),
    "verification": (MaskedReference, "compare"),
}


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("call", [0, 1, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_at_any_stage_undoes_the_cut(stage, call, error, monkeypatch):
    model, groups, optimizer, ema, keep = training_run()
    before = fingerprint(model, optimizer, ema, groups)
    owner, name = STAGES[stage]
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call + 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    try:
        cut(model, groups, keep, optimizer, ema)
    except BaseException:
        assert not differences(before, fingerprint(model, optimizer, ema, groups))
    else:
        assert len(calls) <= call, "nothing was raised although the stage was reached"


@contextmanager
def interrupt_at_line(number: int) -> Iterator[list[int]]:
    """Ctrl-C at the ``number``-th line that runs in the package's surgery. Yields ``[lines seen]``.

    The line of a ``with`` runs a second time when its body is done; Python lets no signal in between that and
    ``__exit__``.
    """
    seen = [0]
    entered: set[tuple[int, int]] = set()

    def watch(frame: Any, event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "call":
            entered.difference_update([place for place in entered if place[0] == id(frame)])
        if event == "line":
            place = (id(frame), frame.f_lineno)
            if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
                if place in entered:
                    return watch
                entered.add(place)
            seen[0] += 1
            if seen[0] == number:
                raise KeyboardInterrupt
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield seen
    finally:
        sys.settrace(before)


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: objects and addresses."""
    values = {}
    for key, value in state.items():
        if isinstance(value, dict) and "memory" in value:
            value = {k: v for k, v in value.items() if k not in ("object", "memory", "gradient object")}
        elif key == "owned" or key.startswith("state of"):
            value = value[1] if key.startswith("state of") else None
        elif key == "groups":
            value = (value[0], value[3])
        values[key] = value
    return values


def test_ctrl_c_at_any_line_leaves_the_old_model_or_the_new_one():
    model, groups, optimizer, ema, keep = training_run(ConvBN)
    with interrupt_at_line(-1) as seen:
        cut(model, groups, keep, optimizer, ema)
    wanted = comparable(fingerprint(model, optimizer, ema, groups))
    total = seen[0]
    assert total > 300
    model, groups, optimizer, ema, keep = training_run(ConvBN)
    before = fingerprint(model, optimizer, ema, groups)
    finished = 0
    for number in [*range(1, total - 10, 23), *range(total - 10, total + 1)]:
        with pytest.raises(KeyboardInterrupt), interrupt_at_line(number):
            cut(model, groups, keep, optimizer, ema)
        assert torch._C._len_torch_function_stack() == 0
        torch.autocast_increment_nesting()
        assert torch.autocast_decrement_nesting() == 0
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        after = fingerprint(model, optimizer, ema, groups)
        if differences(before, after):
            assert not differences(wanted, comparable(after)), f"line {number} of {total}"
            finished += 1
            model, groups, optimizer, ema, keep = training_run(ConvBN)
            before = fingerprint(model, optimizer, ema, groups)
    assert finished <= 2  # only the last lines of all come after the point of no return


def test_a_second_ctrl_c_while_undoing_does_not_stop_it(monkeypatch):
    model, groups, optimizer, ema, keep = training_run()
    before = fingerprint(model, optimizer, ema, groups)
    calls = []

    def impatient(tensor: torch.Tensor, data: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) in (3, 4):
            raise KeyboardInterrupt
        set_data(tensor, data)

    monkeypatch.setattr(importlib.import_module("taylor_cuda.surgery.transaction"), "set_data", impatient)
    monkeypatch.setattr(MaskedReference, "compare", lambda _self: (_ for _ in ()).throw(BoomError))
    with pytest.raises(KeyboardInterrupt):
        cut(model, groups, keep, optimizer, ema)
    assert len(calls) > 4
    assert not differences(before, fingerprint(model, optimizer, ema, groups))


def test_training_after_an_undone_cut_is_as_without_it(monkeypatch):
    def run(*, attempt: bool) -> nn.Module:
        model, groups, optimizer, ema, keep = training_run()
        if attempt:
            with monkeypatch.context() as patch:
                patch.setattr(MaskedReference, "compare", lambda _self: (_ for _ in ()).throw(CutError("no")))
                with pytest.raises(CutError):
                    cut(model, groups, keep, optimizer, ema)
        train_steps(model, groups.example_inputs[0][0], optimizer, 3, seed=9)
        return model

    for p, q in zip(run(attempt=True).parameters(), run(attempt=False).parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_failed_second_cut_leaves_the_first(monkeypatch):
    model, groups, optimizer, ema, keep = training_run()
    cut(model, groups, {"stem": torch.tensor([0, 1, 3, 4])}, optimizer, ema)
    recipe = model.taylor_cuda_recipe
    before = fingerprint(model, optimizer, ema, groups)
    monkeypatch.setattr(MaskedReference, "compare", lambda _self: (_ for _ in ()).throw(CutError("no")))
    with pytest.raises(CutError):
        cut(model, groups, {"stem": torch.tensor([0, 1])}, optimizer, ema)
    assert not differences(before, fingerprint(model, optimizer, ema, groups))
    assert model.taylor_cuda_recipe is recipe
    assert keep


def test_ctrl_c_in_apply_recipe_undoes_it():
    donor, donor_groups, *_, keep = training_run(ConvBN)
    cut(donor, donor_groups, keep)
    model, groups, optimizer, ema, _ = training_run(ConvBN)
    before = fingerprint(model, optimizer, ema, groups)
    for number in range(150, 420, 23):
        with pytest.raises(KeyboardInterrupt), interrupt_at_line(number):
            apply_recipe(model, donor.taylor_cuda_recipe, optimizer, ema, groups)
        assert not differences(before, fingerprint(model, optimizer, ema, groups))


def test_ctrl_c_in_load_undoes_it(tmp_path):
    donor, donor_groups, *_, keep = training_run(ConvBN)
    cut(donor, donor_groups, keep)
    save(donor, tmp_path / "small.safetensors")
    model, *_ = make(ConvBN, seed=5)
    before = fingerprint(model)
    with interrupt_at_line(-1) as seen:
        load(make(ConvBN, seed=5)[0], tmp_path / "small.safetensors")
    for number in [*range(1, seen[0] - 30, 71), *range(seen[0] - 30, seen[0] - 1, 2)]:
        with pytest.raises(KeyboardInterrupt), interrupt_at_line(number):
            load(model, tmp_path / "small.safetensors")
        assert not differences(before, fingerprint(model)), number


def test_transaction_without_an_exception_changes_nothing():
    tensor = nn.Parameter(torch.zeros(4))
    with Transaction([], [tensor]):
        set_data(tensor, torch.ones(2))
    assert torch.equal(tensor, torch.ones(2))
