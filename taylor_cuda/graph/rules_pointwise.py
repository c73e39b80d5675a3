"""Rules of elementwise ops, of reductions, of pooling, and of tensors made from nothing."""

from __future__ import annotations

import re

from torch import Tensor

from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import Array, Dims
from taylor_cuda.graph.rules import Op, rule, tensors_in


@rule(
    "relu leaky_relu abs neg positive clone alias contiguous _to_copy lift lift_fresh lift_fresh_copy",
    "native_dropout dropout taylor_cuda.score_gate",
)
def homogeneous(flow: Flow, op: Op) -> None:
    """Elementwise, and f(z·x) = z·f(x) for z > 0."""
    dims = flow.of(op.x)
    for out in tensors_in(op.out):
        if out.dtype.is_floating_point != op.x.dtype.is_floating_point:
            dims = [flow.clear(labels) for labels in dims]
        flow.put(out, dims)
    if op.name in ("alias", "_to_copy", "lift_fresh"):
        flow.put_source(op.out, flow.source(op.x))


@rule(
    "acos acosh asin asinh atan atanh ceil celu clamp clamp_max clamp_min cos cosh deg2rad detach digamma elu",
    "erf erfc erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan",
    "lgamma log log10 log1p log2 log_sigmoid_forward logical_not logit mish nan_to_num reciprocal relu6 round",
    "rsqrt selu sigmoid sign silu sin sinh softplus softshrink sqrt square tan tanh threshold trunc bitwise_not",
)
def elementwise(flow: Flow, op: Op) -> None:
    """Elementwise, with any dependence on the value (``detach``: with none of the gradient)."""
    tensors = list(tensors_in(op.args, op.kwargs))
    if len(tensors) > 1:
        combined(flow, op)
        return
    dims = [flow.clear(labels) for labels in flow.of(op.x)]
    for out in tensors_in(op.out):
        if out.dim() == len(dims):
            flow.put(out, dims)


@rule("bernoulli cauchy exponential fill geometric log_normal normal random uniform zero")
def filled(flow: Flow, op: Op) -> None:
    """Overwritten with constants or chance; the channels stay what they are for whoever views the tensor."""
    if op.out.dim() == op.x.dim():
        flow.put(op.out, [flow.clear(labels) for labels in flow.of(op.x)])


def _broadcast(flow: Flow, op: Op, tensors: list[Tensor], out: Tensor) -> Dims:
    """Labels of ``out``: every tensor that has a dimension in full shares its channels."""
    dims: Dims = []
    of = [flow.of(tensor) for tensor in tensors]
    for dim, size in enumerate(out.shape):
        full: list[Array | None] = []
        for tensor, labels in zip(tensors, of, strict=True):
            at = dim - out.dim() + tensor.dim()
            if at < 0:
                continue
            if tensor.shape[at] == size:
                full.append(labels[at])
            else:
                flow.freeze([labels[at]], f"{op.said}: a single channel, broadcast")
        dims.append(flow.join(full, f"{op.said} with a tensor whose channels stay") if full else None)
    return dims


@rule(
    "add sub rsub maximum minimum where pow fmod remainder atan2 hypot lerp addcmul addcdiv copysign",
    "_prelu_kernel rrelu_with_noise eq ne lt le gt ge masked_fill xlogy",
    "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor",
)
def combined(flow: Flow, op: Op) -> None:
    """Elementwise over several tensors."""
    dims = _broadcast(flow, op, list(tensors_in(op.args, op.kwargs)), op.out)
    flow.put(op.out, [flow.clear(labels) for labels in dims])


@rule("mul", "div", "true_divide")
def scaled(flow: Flow, op: Op) -> None:
    """A product or quotient: homogeneous in its one labelled factor if the other doesn't vary over labels."""
    tensors = list(tensors_in(op.args))
    of = [flow.of(tensor) for tensor in tensors]
    labelled = [at for at, dims in enumerate(of) if any(labels is not None for labels in dims)]
    dims = _broadcast(flow, op, tensors, op.out)
    if len(labelled) > 1 or (op.name.startswith(("div", "true")) and labelled == [1]) or "rounding_mode" in op.kwargs:
        dims = [flow.clear(labels) for labels in dims]
    flow.put(op.out, dims)


@rule("copy", "_copy_from")
def copy(flow: Flow, op: Op) -> None:
    """The first tensor takes the second's values; its own channels stay what they are for whoever views them."""
    dims = _broadcast(flow, op, list(op.args[:2]), op.out)
    flow.put(op.out, [flow.clear(labels) for labels in dims])


def _reduce(flow: Flow, op: Op, over: list[int], keepdim: bool, linear: bool) -> None:
    dims = flow.of(op.x)
    flow.freeze([dims[dim] for dim in over], f"{op.said} over channels")
    if not linear:
        dims = [flow.clear(labels) for labels in dims]
    kept: Dims = [None if dim in over else labels for dim, labels in enumerate(dims) if keepdim or dim not in over]
    for out in tensors_in(op.out):
        flow.put(out, kept)


@rule("mean", "sum", "nansum")
def mean(flow: Flow, op: Op) -> None:
    """Linear over what it reduces."""
    _reduce(flow, op, op.dims(1, "dim", op.x.dim()), bool(op.arg(2, "keepdim", False)), linear=True)


@rule("amax", "amin", "max", "min", "median", "nanmedian")
def extreme(flow: Flow, op: Op) -> None:
    """The greatest or least along dimensions, or of two tensors."""
    if isinstance(op.arg(1, "other"), Tensor):
        combined(flow, op)
        return
    _reduce(flow, op, op.dims(1, "dim", op.x.dim()), bool(op.arg(2, "keepdim", False)), linear=True)


@rule("var", "std", "var_mean", "std_mean", "prod", "any", "all", "argmax", "argmin", "logsumexp")
def statistic(flow: Flow, op: Op) -> None:
    """Other reductions that take their dimensions second."""
    position = 3 if op.name.startswith(("var", "std")) else 2
    keepdim = bool(op.arg(position, "keepdim", False))
    _reduce(flow, op, op.dims(1, "dim", op.x.dim()), keepdim, linear=False)


@rule("linalg_vector_norm")
def vector_norm(flow: Flow, op: Op) -> None:
    """A norm over dimensions."""
    _reduce(flow, op, op.dims(2, "dim", op.x.dim()), bool(op.arg(3, "keepdim", False)), linear=False)


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "flip", "roll")
def along(flow: Flow, op: Op) -> None:
    """Mixes or moves indices along some dimensions, each of which stays."""
    position = 2 if op.name in ("roll", "topk") else 1
    name = "dims" if op.name in ("flip", "roll") else "dim"
    rank = op.x.dim()
    default = [-1] if op.name in ("sort", "topk") else None
    over = op.dims(position, name, rank) if op.arg(position, name) is not None or default is None else [rank - 1]
    dims = [flow.clear(labels) for labels in flow.of(op.x)]
    for dim in over:
        dims[dim] = flow.free([dims[dim]], f"{op.said} over channels")[0]
    for out in tensors_in(op.out):
        flow.put(out, dims)


_POOLS = [
    *(
        f"{kind}_pool{n}d"
        for kind in ("avg", "_adaptive_avg", "adaptive_avg", "adaptive_max", "max")
        for n in (1, 2, 3)
    ),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d",
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa mkldnn_max_pool2d mkldnn_adaptive_avg_pool2d",
]


@rule(*_POOLS)
def pool(flow: Flow, op: Op) -> None:
    """Pools, resamples or pads over space: the last one, two or three dimensions."""
    found = re.search(r"(\d)d", op.name)
    assert found is not None
    rank = int(found.group(1))
    dims = flow.of(op.x)
    kept = [*dims[:-rank], *flow.free(dims[-rank:], f"{op.said} over channels")]
    for out in tensors_in(op.out):
        flow.put(out, kept)


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(flow: Flow, op: Op) -> None:
    """Every channel on its own, at positions that no channel is part of."""
    dims = flow.of(op.x)
    flow.freeze([*flow.of(op.args[1]), *dims[2:]], "positions of a grid")
    flow.put(op.out, [*dims[:2], *[None] * (op.out.dim() - 2)])


@rule("triu", "tril")
def triangle(flow: Flow, op: Op) -> None:
    """Zero on one side of the diagonal of the last two dimensions."""
    dims = flow.of(op.x)
    flow.put(op.out, [*dims[:-2], *flow.free(dims[-2:], f"{op.said} over channels")])


@rule("glu")
def glu(flow: Flow, op: Op) -> None:
    """The first half times the sigmoid of the second: the halves are one set of channels."""
    dim = int(op.arg(1, "dim", -1)) % op.x.dim()
    dims = [flow.clear(labels) for labels in flow.of(op.x)]
    labels = dims[dim]
    if labels is not None:
        first, second = labels[: labels.size // 2], labels[labels.size // 2 :]
        flow.equal(first, second, "the halves of a gated linear unit")
        dims[dim] = first
    flow.put(op.out, dims)


@rule(
    "arange empty empty_strided eye full linspace logspace new_empty new_empty_strided new_full new_ones new_zeros",
    "ones rand randint randn randperm scalar_tensor tril_indices triu_indices zeros bartlett_window hann_window",
)
def created(flow: Flow, op: Op) -> None:
    """A tensor of a size that the code gives carries no labels."""


@rule("empty_like full_like ones_like rand_like randint_like randn_like zeros_like")
def created_like(flow: Flow, op: Op) -> None:
    """A tensor of another's size, with that one's channels."""
    dims = flow.of(op.x)
    same = tuple(op.out.shape) == tuple(op.x.shape)
    flow.put(op.out, [flow.plain(labels) for labels in dims] if same else [None] * op.out.dim())


@rule("_local_scalar_dense", "_assert_async", "item", "is_nonzero")
def scalar(flow: Flow, op: Op) -> None:
    """A number for Python code, from one element."""
