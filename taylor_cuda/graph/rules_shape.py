"""Rules of ops that move, merge, split, repeat or select indices."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import FREE, Array, Dims
from taylor_cuda.graph.rules import Op, rule, tensors_in

MOST_LABELS = 1 << 26
"""Indices of one dimension whose labels are kept apart: half a GiB of them."""


def _permuted(flow: Flow, op: Op, order: list[int]) -> None:
    dims = flow.of(op.x)
    flow.put(op.out, [dims[dim] for dim in order])
    source = flow.source(op.x)
    if source is not None:
        flow.put_source(op.out, replace(source, dims=tuple(source.dims[dim] for dim in order)))


@rule("t", "numpy_T")
def transposed(flow: Flow, op: Op) -> None:
    """All dimensions in reverse (``t`` is for two at most)."""
    _permuted(flow, op, list(range(op.x.dim()))[::-1])


@rule("transpose", "swapaxes", "swapdims")
def transpose(flow: Flow, op: Op) -> None:
    """Two dimensions change places."""
    rank = op.x.dim()
    order = list(range(rank))
    a, b = (int(dim) % max(rank, 1) for dim in op.args[1:3])
    if rank:
        order[a], order[b] = order[b], order[a]
    _permuted(flow, op, order)


@rule("permute")
def permute(flow: Flow, op: Op) -> None:
    """Dimensions in a new order."""
    _permuted(flow, op, [int(dim) % op.x.dim() for dim in op.args[1]])


def _blocks(old: list[int], new: list[int]) -> list[tuple[range, range]]:
    """Runs of old and new dimensions with equal products, as short as can be."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        a = b = 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new) and (a != 1 or i == start_i or new[j] == 1):
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks


def _reshape_block(flow: Flow, dims: Dims, old: list[int], new: list[int], asked: int | None) -> Dims:
    """Labels of one run of dimensions ``old`` seen as ``new`` (equal products).

    Channels seen as a grid (heads and what is in each; groups and what is in each) can only shrink along one dimension
    of it: the one that the code left open with a -1 (``asked``), or the heads that its module counts, or else the last,
    whose size code mostly computes.
    Channels that differ in the others only are one unit. Where the code counts on something else, the proof says so.
    """
    labelled = [dim for dim, labels in enumerate(dims) if labels is not None]
    if not labelled:
        return [None] * len(new)
    if not new:
        flow.freeze(dims, "a single channel squeezed away")
        return []
    if len(old) == len(new) == 1:
        return dims
    if len(labelled) > 1:
        flow.freeze(dims, "two dimensions of channels merged by a view")
        return [None] * len(new)
    if prod(old) > MOST_LABELS:
        flow.freeze(dims, "a view that merges more indices than can be followed")
        return [None] * len(new)
    at = labelled[0]
    labels = dims[at]
    assert labels is not None
    grid = _grid(labels, old, at, new)
    vary = [dim for dim in range(grid.ndim) if new[dim] > 1 and bool((grid != grid.take([0], dim)).any())]
    # one channel in all: it goes to the dimension with as many indices, so that it still meets what has them
    axis = vary[-1] if vary else max(range(grid.ndim), key=lambda dim: new[dim])
    result: Dims = [None] * len(new)
    if len(vary) > 1:
        # [query, key and value; heads; what is in each]: heads come last but one, however many there are
        heads = sorted((dim for dim in vary if flow.heads(new[dim])), key=lambda dim: (dim < len(new) - 1, dim))
        axis = asked if asked is not None and asked in vary else heads[-1] if heads else axis
        cleared = flow.clear(labels)
        assert cleared is not None
        grid = grid if cleared is labels else _grid(cleared, old, at, new)
        along = np.moveaxis(grid, axis, 0).reshape(new[axis], -1)
        flow.equal(np.repeat(along[:, 0], along.shape[1]), along.ravel(), "seen as a grid with channels that stay")
    result[axis] = units = np.moveaxis(grid, axis, 0).reshape(new[axis], -1)[:, 0].copy()
    if len(vary) > 1:
        flow.count_heads(units)
    return result


def _grid(labels: Array, old: list[int], at: int, new: list[int]) -> Array:
    """The labels of dimension ``at`` of ``old`` at every index of ``new``."""
    return np.tile(np.repeat(labels, prod(old[at + 1 :])), prod(old[:at])).reshape(new)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten", "view_copy")
def view(flow: Flow, op: Op) -> None:
    """The same numbers in the same order under another shape."""
    out: Tensor = op.out
    dims = flow.of(op.x)
    if out.numel() == 0 or out.numel() != op.x.numel() or out.dtype != op.x.dtype:
        flow.freeze(dims, f"{op.said} of an empty tensor or to another type")
        flow.put(out, [None] * out.dim())
        return
    old, new = list(op.x.shape), list(out.shape)
    if old == new:
        flow.put(out, dims)
        return
    asked = flow.asked.index(-1) if -1 in flow.asked and len(flow.asked) == len(new) else None
    result: Dims = []
    for before, after in _blocks(old, new):
        sizes = [old[dim] for dim in before]
        open_dim = asked - after.start if asked is not None and asked in after else None
        result += _reshape_block(flow, [dims[dim] for dim in before], sizes, [new[dim] for dim in after], open_dim)
    flow.put(out, result)


@rule("as_strided", "resize")
def as_strided(flow: Flow, op: Op) -> None:
    """Only where the shape stays (strides alone change)."""
    dims = flow.of(op.x)
    if op.out.dim() == len(dims) and op.name.endswith("_") and tuple(op.out.shape) == tuple(op.args[1]):
        flow.put(op.out, dims)
        return
    flow.freeze(dims, f"no rule for aten.{op.said} to another shape")
    flow.put(op.out, [None] * op.out.dim())


@rule("expand")
def expand(flow: Flow, op: Op) -> None:
    """Dimensions of one index repeated; new ones in front."""
    dims = flow.of(op.x)
    new = op.out.dim() - len(dims)
    result: Dims = [None] * new
    for dim, labels in enumerate(dims):
        same = op.out.shape[new + dim] == op.x.shape[dim]
        result.append(labels if same else flow.free([labels], "a single channel, expanded")[0])
    flow.put(op.out, result)


@rule("repeat")
def repeat(flow: Flow, op: Op) -> None:
    """Whole copies one after the other."""
    times = [int(count) for count in op.args[1]]
    dims = flow.of(op.x)
    new = len(times) - len(dims)
    tiled: Dims = [
        labels if labels is None else np.tile(labels, count) for labels, count in zip(dims, times[new:], strict=True)
    ]
    flow.put(op.out, [*[None] * new, *tiled])


@rule("cat", "concat")
def cat(flow: Flow, op: Op) -> None:
    """One after the other along one dimension; the others are shared."""
    # a tensor of shape [0] is allowed anywhere in the list and adds nothing
    tensors = [tensor for tensor in op.args[0] if tuple(tensor.shape) != (0,)]
    if not tensors:
        return
    out: Tensor = op.out
    dim = int(op.arg(1, "dim", 0)) % out.dim()
    of = [flow.of(tensor) for tensor in tensors]
    dims: Dims = []
    for at in range(out.dim()):
        if at != dim:
            dims.append(flow.join([labels[at] for labels in of], "concatenated with a tensor that has other channels"))
        elif all(labels[at] is None for labels in of):
            dims.append(None)
        else:
            parts = [
                np.full(tensor.shape[at], FREE, dtype=np.int64) if labels[at] is None else labels[at]
                for tensor, labels in zip(tensors, of, strict=True)
            ]
            dims.append(np.concatenate(parts))  # type: ignore[arg-type]
    flow.put(out, dims)


@rule("stack")
def stack(flow: Flow, op: Op) -> None:
    """A new dimension; all others are shared."""
    dim = int(op.arg(1, "dim", 0)) % op.out.dim()
    of = [flow.of(tensor) for tensor in op.args[0]]
    text = "stacked with a tensor that has other channels"
    shared: Dims = [flow.join([labels[at] for labels in of], text) for at in range(op.out.dim() - 1)]
    flow.put(op.out, [*shared[:dim], None, *shared[dim:]])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "split_copy")
def split(flow: Flow, op: Op) -> None:
    """Equal parts lose the same channels, so that a ``chunk`` cuts at the same place; unequal parts stay."""
    dim = int(op.arg(2, "dim", 0)) % op.x.dim()
    dims = flow.of(op.x)
    labels = dims[dim]
    parts: list[Array | None] = [None] * len(op.out)
    if labels is not None:
        sizes = [int(part.shape[dim]) for part in op.out]
        if len(set(sizes)) == 1:
            parts = list(np.split(labels, len(sizes)))
            for part in parts[1:]:
                flow.equal(parts[0], part, "split together with channels that stay")
        else:
            flow.freeze([labels], "split into unequal parts")
    for out, part in zip(op.out, parts, strict=True):
        flow.put(out, [*dims[:dim], part, *dims[dim + 1 :]])


@rule("slice", "narrow")
def slice_(flow: Flow, op: Op) -> None:
    """A stretch of a dimension without channels; of channels only all of them."""
    dim = int(op.arg(1, "dim", 0)) % op.x.dim()
    dims = flow.of(op.x)
    if dims[dim] is not None and op.out.shape[dim] != op.x.shape[dim]:
        dims[dim] = flow.free([dims[dim]], "sliced at positions that the code holds")[0]
    flow.put(op.out, dims)


@rule("index_select")
def index_select(flow: Flow, op: Op) -> None:
    """Chosen indices of a dimension without channels."""
    dim = int(op.args[1]) % op.x.dim()
    dims = flow.of(op.x)
    dims[dim] = flow.free([dims[dim]], "selected at positions that the code holds")[0]
    flow.put(op.out, dims)


@rule("index")
def index(flow: Flow, op: Op) -> None:
    """Indices of dimensions without channels; the indexed ones come where the first was, or in front if apart."""
    dims = flow.of(op.x)
    given = list(op.args[1])
    at = [dim for dim, indices in enumerate(given) if indices is not None]
    flow.freeze([dims[dim] for dim in at], "selected at positions that the code holds")
    flow.freeze_tensors(tensors_in(given), "used as indices")
    taken = [indices for indices in given if indices is not None]
    if any(indices.dtype in (torch.bool, torch.uint8) for indices in taken):  # takes as many dimensions as it has
        flow.freeze(dims, "selected by a mask")
        flow.put(op.out, [None] * op.out.dim())
        return
    new: Dims = [None] * (op.out.dim() - (op.x.dim() - len(at)))
    together = at == list(range(at[0], at[0] + len(at))) if at else True
    first = at[0] if at and together else 0
    rest = [labels for dim, labels in enumerate(dims) if dim not in at]
    before = first if together else 0
    flow.put(op.out, [*rest[:before], *new, *rest[before:]])


@rule("select")
def select(flow: Flow, op: Op) -> None:
    """One index of a dimension without channels."""
    dim = int(op.args[1]) % op.x.dim()
    dims = flow.of(op.x)
    flow.freeze([dims.pop(dim)], "a single channel selected by its number")
    flow.put(op.out, dims)


@rule("unbind")
def unbind(flow: Flow, op: Op) -> None:
    """Every index of a dimension without channels."""
    dim = int(op.arg(1, "dim", 0)) % op.x.dim()
    dims = flow.of(op.x)
    flow.freeze([dims.pop(dim)], "channels taken apart one by one")
    for out in tensors_in(op.out):
        flow.put(out, list(dims))


@rule("constant_pad_nd")
def constant_pad(flow: Flow, op: Op) -> None:
    """Padding along dimensions without channels."""
    pad = op.args[1]
    dims = flow.of(op.x)
    for at in range(len(pad) // 2):
        dim = op.x.dim() - 1 - at
        if pad[2 * at] or pad[2 * at + 1]:
            dims[dim] = flow.free([dims[dim]], "padding along channels")[0]
    if op.arg(2, "value", 0):
        dims = [flow.clear(labels) for labels in dims]
    flow.put(op.out, dims)


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, op: Op) -> None:
    """The channels that become one channel's pixels are one unit."""
    dims = flow.of(op.x)
    factor = int(op.args[1]) ** 2
    labels = flow.clear(dims[-3])
    flow.freeze(dims[-2:], "pixel_shuffle over channels")
    if labels is not None:
        lead = labels.reshape(-1, factor)[:, 0]
        flow.equal(np.repeat(lead, factor), labels, "shuffled into one channel")
        labels = lead
    flow.put(op.out, [*dims[:-3], labels, None, None])


@rule("pixel_unshuffle", "im2col")
def pixel_unshuffle(flow: Flow, op: Op) -> None:
    """Every channel becomes several."""
    dims = flow.of(op.x)
    at = op.x.dim() - 3
    flow.freeze(dims[at + 1 :], f"{op.said} over channels")
    labels = dims[at]
    if labels is not None:
        labels = np.repeat(labels, op.out.shape[at] // op.x.shape[at])
    flow.put(op.out, [*dims[:at], labels, *[None] * (op.out.dim() - at - 1)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Flow, op: Op) -> None:
    """Channel j of every group comes to lie side by side: those are one unit, for the number of groups stays."""
    dims = flow.of(op.x)
    labels = flow.clear(dims[1])
    if labels is not None:
        groups = int(op.args[1])
        lead = labels.reshape(groups, -1)[0]
        flow.equal(np.tile(lead, groups), labels, "shuffled together with channels that stay")
        labels = np.repeat(lead, groups)
    flow.put(op.out, [dims[0], labels, *dims[2:]])
