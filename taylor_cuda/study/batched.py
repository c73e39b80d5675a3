"""One op on many copies of its arguments at once. Copies lie along a new first dimension, ``[K, …]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from taylor_cuda.study.recording import Node, Ref

__all__ = ["run_node"]

Values = Callable[[int], Tensor]

_aten = torch.ops.aten
_BATCH_NORMS = frozenset(
    {
        _aten.native_batch_norm.default,
        _aten.cudnn_batch_norm.default,
        _aten.miopen_batch_norm.default,
        _aten._native_batch_norm_legit_no_training.default,
    }
)
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default})
"""What the recorded layout allowed, that of the copies may not."""


def run_node(node: Node, copies: dict[int, Tensor], single: Values) -> dict[int, Tensor]:
    """The results of one op, ``[K, …]`` each.

    Args:
        node: the op.
        copies: values of which there are K copies, among them at least one input of the op.
        single: any other value, which all copies share.
    """
    at = [index for index, leaf in enumerate(node.flat) if isinstance(leaf, Ref) and leaf.value in copies]
    flat: list[Any] = [
        leaf if not isinstance(leaf, Ref) else copies[leaf.value] if leaf.value in copies else single(leaf.value)
        for leaf in node.flat
    ]
    if torch.Tag.pointwise in node.func.tags and _broadcasts(flat, at):
        results = _call(node, flat)
    elif node.func in _BATCH_NORMS and at == [0] and not _trains(node, flat):
        # copies are more examples to it; torch.vmap would lay them beside the channels, which costs two copies
        results = [_call(node, [flat[0].flatten(0, 1), *flat[1:]])[0].unflatten(0, flat[0].shape[:2])]
    elif node.func in _VIEWS:
        results = [flat[0].reshape(len(flat[0]), *flat[1:])]
    elif node.func in _ATTENTION and all(index < 3 for index in at):
        results = _attention(node, flat, at)
    else:
        results = _mapped(node, flat, at)
    return dict(zip(node.outputs, results, strict=False))


def _call(node: Node, flat: list[Any]) -> list[Tensor]:
    args, kwargs = tree_unflatten(flat, node.spec)
    return [leaf for leaf in tree_flatten(node.func(*args, **kwargs))[0] if isinstance(leaf, Tensor)]


def _mapped(node: Node, flat: list[Any], at: list[int]) -> list[Tensor]:
    def once(*tensors: Tensor) -> tuple[Tensor, ...]:
        mine = list(flat)
        for index, tensor in zip(at, tensors, strict=True):
            mine[index] = tensor
        return tuple(_call(node, mine))

    inputs = [flat[index] for index in at]
    try:
        return list(torch.vmap(once)(*inputs))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a rule that is missing or wrong, as torch 2.14's for slice_scatter: one copy after the other
        rows = [once(*row) for row in zip(*inputs, strict=True)]
        return [torch.stack(results) for results in zip(*rows, strict=True)]


def _broadcasts(flat: list[Any], at: list[int]) -> bool:
    """Whether shapes, aligned at the right, match with one more dimension in front of the copies."""
    ranks = {flat[index].dim() - 1 for index in at}
    others = [leaf.dim() for index, leaf in enumerate(flat) if isinstance(leaf, Tensor) and index not in at]
    return len(ranks) == 1 and 0 not in ranks and all(rank <= min(ranks) for rank in others)


def _trains(node: Node, flat: list[Any]) -> bool:
    names = [argument.name for argument in node.func._schema.arguments]
    return "training" in names and bool(flat[names.index("training")])


def _attention(node: Node, flat: list[Any], at: list[int]) -> list[Tensor]:
    """Copies are more examples; a mask for each example is repeated."""
    shape = flat[at[0]].shape[:2]
    folded = list(flat)
    for index, leaf in enumerate(flat):
        if index in at:
            folded[index] = leaf.flatten(0, 1)
        elif isinstance(leaf, Tensor) and (index < 3 or (leaf.dim() == 4 and leaf.shape[0] > 1)):
            folded[index] = leaf.expand(shape[0], *leaf.shape).flatten(0, 1)
    return [_call(node, folded)[0].unflatten(0, shape)]
