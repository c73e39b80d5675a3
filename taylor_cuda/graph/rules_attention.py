"""Rules of products of activations: attention, whole or by hand."""

from __future__ import annotations

from math import prod

from torch import Tensor

from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import Array, Dims
from taylor_cuda.graph.rules import Op, rule, tensors_in

_CONTRACTED = "contracted by a product of activations"
_BATCHED = "a product of activations with a tensor whose channels stay"


@rule("bmm")
def bmm(flow: Flow, op: Op) -> None:
    """``[n, i, j] @ [n, j, k]``: every n on its own, so heads among them can go; rows and columns pass."""
    a, b = op.args[:2]
    left, right = flow.of(a), flow.of(b)
    flow.freeze([left[2], right[1]], _CONTRACTED)
    batch = flow.join([left[0], right[0]], _BATCHED)
    flow.call(None, op.name, prod(a.shape) * b.shape[2], along=batch)
    flow.put(op.out, [flow.clear(labels) for labels in (batch, left[1], right[2])])


@rule("baddbmm")
def baddbmm(flow: Flow, op: Op) -> None:
    """The same plus a tensor: what takes part in it stays."""
    a, b = op.args[-2:]
    flow.call(None, op.name, prod(a.shape) * b.shape[2])
    flow.freeze_tensors(tensors_in(op.args), "a product of activations")
    flow.put(op.out, [None, None, None])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(flow: Flow, op: Op) -> None:
    """``[n, heads, tokens, size]``: every head on its own; the value's size passes, the query's and key's stays."""
    query, key, value = op.args[:3]
    out: Tensor = op.out if isinstance(op.out, Tensor) else op.out[0]
    flow.freeze([flow.of(query)[3], flow.of(key)[3]], _CONTRACTED)
    flow.freeze([flow.of(key)[2], flow.of(value)[2]], "the tokens that an attention sums over")
    heads = [flow.of(tensor)[1] for tensor in (query, key, value)]
    same = query.shape[1] == key.shape[1] == value.shape[1]
    if not same:  # grouped queries: several heads share a key
        flow.freeze(heads, "heads that share their keys")
        heads = [None]
    head = flow.join(heads, "attention of heads that stay")
    masks = [tensor for tensor in tensors_in(op.args[3:], op.kwargs) if tensor.dim() >= 2]
    for mask in masks:
        head = _masked(flow, mask, head, query.shape[1])
    macs = query[..., 0].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])
    flow.call(None, op.name, macs, along=head)
    dims: Dims = [flow.of(query)[0], head, flow.of(query)[2], flow.of(value)[3]]
    flow.put(out, [flow.clear(labels) for labels in dims])


def _masked(flow: Flow, mask: Tensor, head: Array | None, count: int) -> Array | None:
    """The heads' labels after a bias for every head, or for none, was added to the products."""
    dims = flow.of(mask)
    text = "attention with a bias whose heads stay"
    if mask.dim() >= 3 and mask.shape[-3] == count and count > 1:
        flow.freeze([*dims[:-3], *dims[-2:]], text)
        return flow.join([head, dims[-3]], text)
    flow.freeze(dims, text)
    return head
