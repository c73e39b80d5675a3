"""What forward passes left at the inputs of all readers, as the vectors that ``UnitSums`` takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import ChannelGroup
from taylor_cuda.importance.activations import ForwardPass
from taylor_cuda.importance.units import UnitSums

__all__ = ["batch_sums", "by_example", "example_sums", "rows_of_outputs"]


def batch_sums(passes: Sequence[ForwardPass], readers: Sequence[str], units: UnitSums) -> list[Tensor]:
    """Σ_{n,l} a·g over all passes, ``[C_i]`` for each reader (the second source of ``units``); zeros where none ran."""
    totals: Sequence[Tensor] = ()
    for forward in passes:
        found = units.completed(1, [forward.sums.get(name) for name in readers])
        totals = torch._foreach_add(list(totals), found) if totals else found
    return list(totals)


def rows_of_outputs(outputs: Sequence[Tensor], passes: Sequence[ForwardPass]) -> list[int]:
    """How many rows, side by side, each output has for one example: tokens, where they were flattened into the batch.

    Raises:
        InputError: the layers' inputs have numbers of rows that don't fit any number of examples.
    """
    fewest = sorted({_fewest(forward) for forward in passes if forward.examples()}, reverse=True)
    found = []
    for output in outputs:
        rows = len(output)
        fitting = [1 for few in fewest if few % rows == 0] or [rows // few for few in fewest if rows % few == 0]
        if not fitting:
            raise InputError(
                f"outputs: wanted a row for every example, or the same number of rows, got {rows} rows in one of them "
                f"where layers read batches of {', '.join(map(str, fewest))}"
            )
        found.append(fitting[0])
    return found


def by_example(forward: ForwardPass, examples: Sequence[int] = ()) -> ForwardPass:
    """The pass with one row an example where layers read several side by side: windows or tokens in the batch.

    Args:
        forward: settled.
        examples: which numbers of examples there may be; the fewest rows at any reader where none of them fits.

    Raises:
        InputError: a reader's rows are no multiple of the examples.
    """
    few = _fewest(forward)
    count = max((each for each in examples if few % each == 0), default=few)
    if any(len(sums) % count for sums in forward.sums.values()):
        raise InputError(
            f"layers read batches of {', '.join(map(str, sorted(forward.examples())))} in one forward pass, which are "
            f"not those of {count} examples: per-example criteria can't be had here, use criterion='taylor_fo'"
        )
    sums = {
        name: each if len(each) == count else each.unflatten(0, (count, -1)).sum(1)
        for name, each in forward.sums.items()
    }
    return ForwardPass(sums, forward.kept, forward.length)


def _fewest(forward: ForwardPass) -> int:
    few, *more = sorted(forward.examples())
    if few == 1 and more:
        raise InputError(
            f"layers read batches of 1 and of {more[0]} in one forward pass, which can't be told apart by example "
            "where a batch of 1 is spread over the others: use criterion='taylor_fo', or more than one example"
        )
    return few


def example_sums(
    groups: Iterable[ChannelGroup],
    passes: Sequence[ForwardPass],
    readers: Sequence[str],
    units: UnitSums,
    *,
    mean: bool,
) -> list[Tensor]:
    """t[n, position], the Σ_l a·g of each example at all readers, the examples of all forward passes below one another.

    A group's readers have one number of examples in a pass. Where other groups' have more, the rows they lack are
    zeros, which no sum over examples notices.

    Args:
        groups: each has a reader in every pass.
        passes: one of them at least.
        readers: names of the weights.
        units: the readers are its second source.
        mean: divide each reader's sums by its L and its number of examples, so that sums over examples are means.

    Returns:
        ``[N, C_i]`` for each reader, or one ``[N, P]`` of all of them; contiguous.

    Raises:
        InputError: a group's readers saw several numbers of examples in one pass, or none of them ran.
    """
    by_pass = [_completed(groups, forward, units, [forward.sums.get(name) for name in readers]) for forward in passes]
    if mean:
        examples = {name: sum(len(forward.sums.get(name, ())) for forward in passes) for name in readers}
        by_pass = [
            list(torch._foreach_div(sums, [float(forward.length.get(n, 1) * max(examples[n], 1)) for n in readers]))
            for forward, sums in zip(passes, by_pass, strict=True)
        ]
    if len(by_pass) == 1:
        return by_pass[0]
    return [torch.cat([torch.cat(sums, dim=1) for sums in by_pass])]


def _completed(
    groups: Iterable[ChannelGroup],
    forward: ForwardPass,
    units: UnitSums,
    found: Sequence[Tensor | None],
) -> list[Tensor]:
    """The sums of one pass with as many rows at every reader."""
    there = [sums for sums in found if sums is not None]
    rows = max(len(sums) for sums in there)
    if len(there) == len(found) and all(len(sums) == rows for sums in there):
        return there
    for group in groups:
        counts = {len(forward.sums[m.tensor]): None for m in group.role("read") if m.tensor in forward.sums}
        if not counts:
            raise InputError(f"group {group.name!r}: none of its readers ran in the last forward pass")
        if len(counts) > 1:
            first, second, *_ = counts
            raise InputError(
                f"group {group.name!r}: its readers see {first} and {second} examples in one forward pass; "
                "per-example criteria need one batch size, use criterion='taylor_fo'"
            )
    return [
        units.zeros(rows * length, there[0]).view(rows, length) if sums is None else _with_rows(sums, rows)
        for sums, length in zip(found, units.lengths[1], strict=True)
    ]


def _with_rows(sums: Tensor, rows: int) -> Tensor:
    return sums if len(sums) == rows else torch.nn.functional.pad(sums, (0, 0, 0, rows - len(sums)))
