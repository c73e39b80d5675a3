"""Rules of layers with weights: convolutions, products, normalisations, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from torch import Tensor

from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import Array, Dims
from taylor_cuda.graph.rules import Op, rule, tensors_in

_COMPUTED = "a layer whose weight is no plain parameter of the model"
# a call's MACs are a number times the size of its weight, so nothing else in it may shrink
_ROWS = "the rows of a product, not what it contracts"


def _is_parameter(flow: Flow, weight: Tensor) -> bool:
    """Whether ``weight`` is a parameter of the model with its dimensions in order."""
    source = flow.parameter(weight)
    return source is not None and source.in_order


@rule("convolution")
def convolution(flow: Flow, op: Op) -> None:
    """The input's channels end at the weight's input dimension; the output's are the weight's output dimension."""
    x, weight, bias, _stride, _padding, _dilation, transposed, _output_padding, groups = op.args
    dims = flow.of(x)
    flow.freeze([dims[0], *dims[2:]], "a convolution over channels")
    space = x if transposed else op.out
    computed = None if _is_parameter(flow, weight) or transposed else flow.of(weight)[0]
    flow.call(weight, "convolution", space.shape[0] * prod(space.shape[2:]), along=computed)
    if not _is_parameter(flow, weight):
        flow.freeze([dims[1]], _COMPUTED)
        written = _written_by_computed(flow, weight, 0 if groups == 1 and not transposed else None, op.out.shape[1])
    elif groups == 1:
        reads, writes = (0, 1) if transposed else (1, 0)
        flow.read(dims[1], weight, reads)
        flow.role(flow.source(weight), writes, "write")
        written = flow.of(weight)[writes]
    else:
        written = _grouped(flow, dims[1], weight, groups, op.out.shape[1])
    if bias is not None:
        flow.equal(flow.of(bias)[0], written, "the bias of a layer whose outputs stay")
    flow.put(op.out, [None, written, *[None] * (op.out.dim() - 2)])


def _written_by_computed(flow: Flow, weight: Tensor, dim: int | None, width: int) -> Array | None:
    """What a layer writes whose weight was computed from parameters: channels where their rows still are rows."""
    labels = None if dim is None else flow.of(weight)[dim]
    if labels is None:
        flow.computed(weight, width, _COMPUTED)
        return None
    flow.freeze([other for at, other in enumerate(flow.of(weight)) if at != dim], _COMPUTED)
    return flow.clear(labels)


@rule("_weight_norm_interface")
def weight_norm(flow: Flow, op: Op) -> None:
    """g·v / |v|, a row at a time: rows can go, what a row sums over stays."""
    v, g = op.args[:2]
    dims = flow.of(v)
    if int(op.arg(2, "dim", 0)) != 0 or not _is_parameter(flow, v):
        flow.freeze_tensors([v, g], _COMPUTED)
        return
    flow.role(flow.source(v), 0, "write")
    flow.equal(dims[0], flow.of(g)[0], "the norms of rows that stay")
    flow.freeze(dims[1:], "normalised over")
    flow.put(op.out[0], [dims[0], *[None] * (v.dim() - 1)])


def _grouped(flow: Flow, labels: Array | None, weight: Tensor, groups: int, width: int) -> Array | None:
    """A convolution group is one unit, input and output; returns the labels of the ``width`` outputs."""
    text = "a grouped convolution of channels that stay"
    inputs = flow.clear(labels)
    first, inner = flow.of(weight)[:2]
    flow.role(flow.source(weight), 0, "write")
    flow.freeze([inner], "inside a convolution group")
    if inputs is None or first is None:
        flow.freeze([inputs, first], text)
        return None
    lead = inputs.reshape(groups, -1)[:, 0]
    flow.equal(np.repeat(lead, inputs.size // groups), inputs, text)
    # a transposed weight has its inputs along dimension 0, a plain one its outputs: whole groups either way
    flow.equal(np.repeat(lead, first.size // groups), first, text)
    return np.repeat(lead, width // groups)


def _product(flow: Flow, op: Op, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``a [rows, inner] @ b [inner, columns]``, where at most one is a parameter, permuted or not."""
    text = "contracted by a product that is not of a weight"
    left, right = flow.parameter(a), flow.parameter(b)
    a_dims, b_dims = flow.of(a), flow.of(b)
    dims: Dims = [a_dims[0], b_dims[1]]
    if right is not None and left is None:
        flow.call(b, op.name, a.shape[0])
        dims[0] = flow.free([dims[0]], _ROWS)[0]
        flow.read(a_dims[1], b, 0)
        flow.role(right, 1, "write")
    elif left is not None and right is None:
        flow.call(a, op.name, b.shape[1])
        dims[1] = flow.free([dims[1]], _ROWS)[0]
        flow.read(b_dims[0], a, 1)
        flow.role(left, 0, "write")
    else:
        flow.freeze(a_dims, text if left is None else _COMPUTED)
        columns = b_dims[1] if left is None and right is None else None
        flow.call(None, op.name, a.shape[0] * a.shape[1] * b.shape[1], along=columns)
        dims = [None, None]
        if any(labels is not None for labels in b_dims):
            dims[1] = _written_by_computed(flow, b, 1 if columns is not None else None, out.shape[1])
    if bias is not None:
        if bias.dim() == 2 and bias.shape[0] > 1:
            flow.equal(flow.of(bias)[0], dims[0], "the bias of a product")
        if bias.shape[-1] == out.shape[1]:
            flow.equal(flow.of(bias)[-1], dims[1], "the bias of a layer whose outputs stay")
        else:
            flow.freeze_tensors([bias], "broadcast")
    flow.put(out, dims)


@rule("mm")
def mm(flow: Flow, op: Op) -> None:
    """A product of two matrices."""
    _product(flow, op, op.args[0], op.args[1], None, op.out)


@rule("addmm")
def addmm(flow: Flow, op: Op) -> None:
    """A product of two matrices plus a bias."""
    _product(flow, op, op.args[1], op.args[2], op.args[0], op.out)


@rule(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_no_update",
)
def batch_norm(flow: Flow, op: Op) -> None:
    """Weight, bias and statistics lie along the channels."""
    out: Tensor = op.out if isinstance(op.out, Tensor) else op.out[0]
    weight, bias, *statistics = op.args[1:5]
    flow.put(out, [None, _over_batch(flow, op.x, weight, bias, statistics), *[None] * (out.dim() - 2)])


@rule("taylor_cuda.batch_norm_relu_forward")
def batch_norm_relu(flow: Flow, op: Op) -> None:
    """A batch normalisation, then an addition to other channels unless there is none, then a ReLU."""
    x, *statistics, weight, bias, residual = op.args[:6]
    labels = _over_batch(flow, x, weight, bias, statistics)
    if residual is not None:
        before, channels, *space = flow.of(residual)
        flow.freeze([before, *space], "an addition to what a batch normalisation makes")
        labels = flow.clear(flow.join([labels, channels], "an addition to channels that stay"))
    y, *vectors = op.out
    flow.put(y, [None, labels, *[None] * (y.dim() - 2)])
    for vector in vectors:
        flow.put(vector, [flow.clear(flow.of(x)[1])])


def _over_batch(flow: Flow, x: Tensor, weight: object, bias: object, statistics: Sequence[object]) -> Array | None:
    """The channels of a batch normalisation's output."""
    dims = flow.of(x)
    flow.freeze([dims[0], *dims[2:]], "a batch normalisation over channels")
    for vector in (weight, bias, *statistics):
        if isinstance(vector, Tensor):
            flow.role(flow.source(vector), 0, "norm")
            flow.equal(flow.of(vector)[0], dims[1], "a normalisation of channels that stay")
    labels = dims[1]
    if isinstance(weight, Tensor) and isinstance(bias, Tensor):
        labels = flow.start(labels, weight, bias)
    return flow.clear(labels) if labels is dims[1] else labels


def _over_last(
    flow: Flow, dims: Dims, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, kind: str
) -> Dims:
    """A normalisation over exactly the last dimension, with a weight: its statistics are taken over what is kept."""
    rest = [flow.clear(labels) for labels in dims[:-1]]
    vectors = [vector for vector in (weight, bias) if vector is not None]
    if len(shape) == 1 and weight is not None and all(flow.parameter(vector) is not None for vector in vectors):
        for vector in vectors:
            flow.role(flow.source(vector), 0, "norm")
            flow.equal(flow.of(vector)[0], dims[-1], "a normalisation of channels that stay")
        return [*rest, flow.clear(dims[-1]) if bias is None else flow.start(dims[-1], weight, bias)]
    text = f"a {kind} normalisation without weight, or over several dimensions"
    flow.freeze_tensors(vectors, text)
    kept = len(dims) - len(shape)
    return [*rest[:kept], *flow.free(dims[kept:], text)]


@rule("native_layer_norm")
def layer_norm(flow: Flow, op: Op) -> None:
    """See :func:`_over_last`."""
    shape, weight, bias = op.args[1:4]
    flow.put(op.out[0], _over_last(flow, flow.of(op.x), shape, weight, bias, "layer"))


def rms_norm(
    flow: Flow,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    out: Tensor,
) -> None:
    """See :func:`_over_last`; no op of its own, so it is met as a function."""
    flow.put(out, _over_last(flow, flow.of(input), normalized_shape, weight, None, "root mean square"))


@rule("native_group_norm")
def group_norm(flow: Flow, op: Op) -> None:
    """A unit is a whole norm group."""
    weight, bias, groups = op.args[1], op.args[2], op.args[6]
    dims = flow.of(op.x)
    flow.freeze(dims[2:], "a group normalisation over channels")
    labels = dims[1]
    out = op.out[0]
    text = "a group normalisation of channels that stay"
    if weight is None or bias is None or labels is None:
        text = "a group normalisation without weight and bias" if weight is None or bias is None else text
        flow.freeze_tensors(tensors_in(weight, bias), text)
        flow.put(out, [dims[0], *flow.free(dims[1:], text)])
        return
    lead = np.repeat(labels.reshape(groups, -1)[:, 0], labels.size // groups)
    flow.equal(lead, labels, text)
    for vector in (weight, bias):
        flow.role(flow.source(vector), 0, "norm")
        flow.equal(flow.of(vector)[0], lead, text)
    started = flow.start(labels, weight, bias)
    flow.put(out, [dims[0], flow.clear(labels) if started is labels else started, *[None] * (out.dim() - 2)])


@rule("embedding")
def embedding(flow: Flow, op: Op) -> None:
    """A table's columns are written for every index."""
    weight, index = op.args[:2]
    flow.freeze(flow.of(index), "indices of an embedding")
    rows, columns = flow.of(weight)
    flow.freeze([rows], "the rows of an embedding")
    if flow.parameter(weight) is None:
        columns = flow.free([columns], _COMPUTED)[0]
    else:
        flow.role(flow.source(weight), 1, "write")
    flow.put(op.out, [*[None] * index.dim(), columns])
