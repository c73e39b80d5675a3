"""``keep_lists`` by hand, how often it reads from the device, and what ops do with lists from elsewhere."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import taylor_cuda as tc
from taylor_cuda.ops import keep

MASKS = [[1, 0, 1, 1], [0, 0], [1, 1, 1], [], [0, 0, 0, 0, 0, 0, 1]]
BY_HAND = {
    1: [[0, 2, 3], [], [0, 1, 2], [], [6]],
    2: [[0, 2, 3, -1], [], [0, 1, 2, -1], [], [6, -1]],
    4: [[0, 2, 3, -1], [], [0, 1, 2, -1], [], [6, -1, -1, -1]],
}


def masks() -> list[Tensor]:
    return [torch.tensor(mask, dtype=torch.bool) for mask in MASKS]


@pytest.mark.parametrize("round_to", BY_HAND)
def test_by_hand(round_to: int) -> None:
    lists = tc.keep_lists(masks(), round_to)
    assert [each.tolist() for each in lists] == BY_HAND[round_to]
    assert all(each.dtype == torch.int64 and each.is_contiguous() for each in lists)


def test_masks_of_any_stride_and_none_at_all() -> None:
    whole = torch.tensor([True, False, False, True, True, True])
    assert [each.tolist() for each in tc.keep_lists((whole[::2], whole[1::2]))] == [[0, 2], [1, 2]]
    assert tc.keep_lists([]) == []


class Reads(TorchDispatchMode):
    """Counts what would cross to another device, and the lists that are made one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


def test_many_masks_cost_as_much_as_one() -> None:
    """Nothing is done mask by mask but taking its part of the result."""
    counts = []
    for number in (2, 50):
        with Reads() as reads:
            tc.keep_lists([torch.ones(5, dtype=torch.bool)] * number, 8)
        counts.append([name for name in reads.seen if name != "aten::ones"])
    assert counts[0] == counts[1]
    assert "aten::nonzero" not in counts[0]


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The lists whose entries are read from here on."""
    seen: list[Tensor] = []
    remember = keep._remember
    monkeypatch.setattr(keep, "_remember", lambda each, entries: (seen.append(each), remember(each, entries)))
    return seen


def test_a_list_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 3, 3)
    (known,) = tc.keep_lists([torch.tensor([True, False, True, False])])
    seen = looked_at(monkeypatch)
    own = torch.tensor([0, 2])
    for _ in range(3):
        tc.pack_channels(x, known)
        tc.pack_channels(x, own)
    assert len(seen) == 1
    own[1] = 3
    assert torch.equal(tc.pack_channels(x, own)[:, 1], x[:, 3])
    assert len(seen) == 2


def test_a_list_that_was_changed_is_looked_at_again() -> None:
    x = torch.randn(2, 4, 3, 3)
    for mine in (torch.tensor([0, 2]), tc.keep_lists([torch.tensor([True, False, True, False])])[0]):
        tc.pack_channels(x, mine)
        mine[1] = 4
        with pytest.raises(tc.InputError, match="keep: wanted channels below 4, got 4"):
            tc.pack_channels(x, mine)
        mine[1] = 0
        with pytest.raises(tc.InputError, match="keep: wanted ascending channels, each once"):
            tc.pack_channels(x, mine)


def test_lists_are_forgotten_with_their_tensors() -> None:
    gc.collect()
    before = len(keep._known)
    lists = tc.keep_lists(masks())
    assert len(keep._known) == before + len(MASKS)
    del lists
    gc.collect()
    assert len(keep._known) == before


def test_inference_mode_has_no_versions() -> None:
    x = torch.randn(2, 4, 3, 3)
    with torch.inference_mode():
        mine = torch.tensor([0, 2])
        tc.pack_channels(x, mine)
        mine[1] = 4
        with pytest.raises(tc.InputError, match="keep: wanted channels below 4"):
            tc.pack_channels(x, mine)
        (made,) = tc.keep_lists([torch.tensor([False, True])])
        assert made.tolist() == [1]


BAD_MASKS: list[tuple[Any, Any, str]] = [
    (torch.ones(3, dtype=torch.bool), 1, "masks: wanted a list of tensors, got Tensor"),
    ([torch.ones(3, dtype=torch.bool), torch.ones(3)], 1, r"masks\[1\]: wanted a bool mask \[C\], got torch.float32"),
    ([torch.ones(3, 1, dtype=torch.bool)], 1, r"masks\[0\]: wanted a bool mask \[C\], got torch.bool \(3, 1\)"),
    ([[True, False]], 1, r"masks\[0\]: wanted a bool mask \[C\], got list"),
    (
        [torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool, device="meta")],
        1,
        r"masks\[1\]: wanted it on cpu, got it on meta",
    ),
    ([torch.ones(3, dtype=torch.bool)], 0, "round_to: wanted an int of at least 1, got 0"),
    ([torch.ones(3, dtype=torch.bool)], True, "round_to: wanted an int of at least 1, got True"),
    ([torch.ones(3, dtype=torch.bool)], 8.0, "round_to: wanted an int of at least 1, got 8.0"),
]


@pytest.mark.parametrize(("given", "round_to", "message"), BAD_MASKS, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(given: Any, round_to: Any, message: str) -> None:
    with pytest.raises(tc.InputError, match=message):
        tc.keep_lists(given, round_to)
