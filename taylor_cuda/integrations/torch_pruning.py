"""For Torch-Pruning: the first-order importance of its groups, in place of ``tp.importance.GroupTaylorImportance``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda import ops
from taylor_cuda.errors import InputError

try:
    import torch_pruning as tp
except ImportError as error:
    raise InputError(
        f"integrations.torch_pruning: needs Torch-Pruning ({error}); pip install 'torch-pruning>=1.6.1'"
    ) from error

from taylor_cuda.integrations.torch_pruning_groups import Member, Place, terms_of, units_of

__all__ = ["TaylorImportance"]

COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


class TaylorImportance(tp.importance.GroupTaylorImportance):  # type: ignore[misc, unused-ignore]
    """First-order importance of Torch-Pruning's channels: (dE/dz)², with one gate z for all that is removed together.

    A drop-in for ``tp.importance.GroupTaylorImportance``::

        imp = tc.integrations.torch_pruning.TaylorImportance()
        pruner = tp.pruner.BasePruner(model, example_inputs, importance=imp, ignored_layers=[model.fc])
        loss_fn(model(inputs), targets).backward()
        pruner.step()

    For the mean over several batches, as in the paper, take the gradients of each with ``imp.update(model)``.

    **What counts.** A pruned channel is gone from the inputs of the layers that read it, so its gate stands there:
    dE/dz = Σ Σ W[:, c]·dW[:, c], signed, over all convolutions and linear layers of the group that read it. That is
    exact whatever lies between: BatchNorm, activations, depthwise filters, concatenations, residual streams. Layers
    that write the channel, and normalisations and depthwise filters on its way, carry the same gate once more and are
    not counted beside it. (For a convolution before a BatchNorm in train mode they would add exactly 0.)

    Where a reader isn't known (the channel is an output of the network, or goes into a layer with a pruner of one's
    own) or isn't trained, the gate stands behind the last layer with trained parameters on every way there:
    γ·dγ + β·dβ of a normalisation, Σ w·dw + b·db of a depthwise filter or of the layer that writes. That is exact where
    the rest of the way keeps proportions (ReLU, pooling, sums). ``nn.MultiheadAttention`` loses inner dimensions with
    its channels: their gates, where values are read and at the queries, are added.

    Channels of the group's first layer that go together (halves of a gated unit, Torch-Pruning's equal parts of grouped
    convolutions and GroupNorms) are summed as well, and each has their joint importance.

    Not seen: that LayerNorm and GroupNorm have other statistics after the cut (``tc.Importance(norm_term=True)``);
    in attention made of linear layers, the products of queries and keys, whose dimensions Torch-Pruning removes with
    those of the values; and that channels are an output of the network as well where Torch-Pruning doesn't see it (an
    inner layer's, returned after the last one's).

    Args:
        group_reduction: ``"sum"`` of the signed terms of a group, or their ``"mean"`` over the layers that count.
        normalizer: of the scores of each group. None: all are the squared change of the loss, which
            ``global_pruning=True`` may compare. Or one of Torch-Pruning's: ``"mean"`` (its default), ``"sum"``,
            ``"max"``, ``"standarization"``, ``"gaussian"``, ``"sentinel_0.5"``, ``"lamp"``, a function of the scores.
        multivariable: True: the terms of all weights are added with their signs. False is refused.
        bias: True: where a gate stands behind a layer, its bias or β is a part of it. False is refused.
        target_types: the kinds of layers that count, all of them: a list without Torch-Pruning's own four is refused.

    Raises:
        InputError: an option that can't be honoured.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz: "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """

    def __init__(
        self,
        group_reduction: str = "sum",
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
        multivariable: bool = True,
        bias: bool = True,
        target_types: Sequence[type] = COUNTED,
    ) -> None:
        if group_reduction not in ("sum", "mean"):
            raise InputError(
                f"group_reduction: wanted 'sum' or 'mean', got {group_reduction!r}; the terms of coupled channels have "
                "signs and are added before they are squared"
            )
        if not multivariable:
            raise InputError(
                "multivariable: wanted True, got False; the weights of a channel go together, so their terms are added "
                "with signs. For sums of magnitudes use tp.importance.GroupTaylorImportance"
            )
        if not bias:
            raise InputError(
                "bias: wanted True, got False; where a gate stands behind a layer its bias is a part of it"
            )
        missing = [kind.__name__ for kind in COUNTED if not issubclass(kind, tuple(target_types))]
        if missing:
            raise InputError(
                f"target_types: wanted all kinds of layers, got a list without {', '.join(missing)}; every layer that "
                "reads a channel has a term of its gate. To leave layers as they are use the pruner's ignored_layers"
            )
        self.group_reduction, self.normalizer = group_reduction, normalizer
        self.multivariable, self.bias, self.target_types = multivariable, bias, list(target_types)
        self._check_normalizer()
        self._window: _Window | None = None

    def _check_normalizer(self) -> None:
        """Torch-Pruning would complain only while it prunes."""
        if callable(self.normalizer):
            return
        try:
            self._normalize(torch.ones(4), self.normalizer)
        except (NotImplementedError, AttributeError, ValueError, IndexError) as error:
            raise InputError(
                "normalizer: wanted None, a function, 'mean', 'sum', 'max', 'standarization', 'gaussian', 'lamp' or "
                f"'sentinel_0.5', got {self.normalizer!r}"
            ) from error

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the gradients of one batch: after ``loss.backward()``, before clipping or the optimizer change them.

        Scores are then the mean of the squares over these batches, and no longer the square of what ``.grad`` holds
        when the pruner asks. Backward passes between two calls add up to one batch. A batch with a value that isn't
        finite is left out (with a ``GradScaler`` call this after ``scaler.unscale_(optimizer)``). After a cut the next
        call begins anew. Keeps a number for every input and output of every layer, a batch, and waits for no GPU.

        Args:
            model: the pruner's.

        Raises:
            InputError: no parameter has a gradient yet.
        """
        if all(parameter.grad is None for parameter in model.parameters()):
            raise InputError("update: no parameter of the model has a gradient yet: call loss.backward() first")
        places = _places(model)
        if self._window is None or not self._window.is_of(places):
            self._window = _Window(places)
        self._window.add()

    def reset(self) -> None:
        """Forget all batches: what ``.grad`` holds counts again."""
        self._window = None

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """The importance of each channel of the first layer of ``group``, in its order: higher means keep.

        Args:
            group: a ``tp.Group`` of all channels of its layers, or of some.

        Returns:
            ``[len(group[0].idxs)]``, float32 (float64 for float64 weights), on the device of the weights; None where
            no parameter counts, which leaves the group as it is.

        Raises:
            InputError: what counts has no gradient yet, or one that isn't finite; nothing that could count is trained;
                layers were pruned since ``update``; Torch-Pruning doesn't say which channels go together.
        """
        members = [Member(item) for item in group]
        layers = terms_of(members)
        if not layers:
            return None
        terms = [term for layer in layers for term in layer]
        rows = self._rows([term.place for term in terms], members[0].name)
        position = {root: i for i, root in enumerate(members[0].roots)}
        sums = rows[0].new_zeros(len(rows[0]), len(position))
        for term, values in zip(terms, rows, strict=True):
            term.check(values.shape[1], position)
            index = torch.tensor([position[root] for root in term.roots], device=sums.device)
            sums.index_add_(1, index, values[:, torch.tensor(term.idxs, device=sums.device)])
        unit = torch.tensor(units_of(members, position), device=sums.device)
        sums = torch.zeros_like(sums).index_add_(1, unit, sums)[:, unit]
        scores = sums.square().sum(0) / (1 if self._window is None else self._window.count)
        if self.group_reduction == "mean":
            scores = scores / len(layers) ** 2
        if not scores.isfinite().all():
            raise InputError(f"{members[0].name}: wanted finite gradients, got some that are infinite or NaN")
        normalized: Tensor = self._normalize(scores, self.normalizer)
        return normalized

    def _rows(self, places: Sequence[Place], name: str) -> list[Tensor]:
        """``[batches, positions]`` of each place: Σ w·dw."""
        if self._window is not None:
            return self._window.rows(places, name)
        if all(place.parameter.grad is None for place in places):
            raise InputError(
                f"{name}: no gradient yet on what its importance is taken from: call loss.backward() before "
                "pruner.step(), and optimizer.zero_grad() after it"
            )
        return [slope[None] for slope in _slopes(places)]


def _slopes(places: Sequence[Place]) -> list[Tensor]:
    """Σ w·dw along every place, in one launch; zeros where no gradient came."""
    weights, gradients, dims = [], [], []
    for place in places:
        gradient = place.parameter.grad
        weight, dim = place.by_position(place.parameter.detach())
        weights.append(weight)
        gradients.append(torch.zeros_like(weight) if gradient is None else place.by_position(gradient)[0])
        dims.append(dim)
    return ops.weight_importance(weights, gradients, dims)


def _places(model: nn.Module) -> list[Place]:
    """Every dimension of channels of every parameter of a model."""
    found: dict[tuple[int, int], Place] = {}
    for module in model.modules():
        groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else None
        for parameter in module.parameters(recurse=False):
            for dim in range(parameter.dim() if groups is None else min(parameter.dim(), 2)):
                place = Place(parameter, dim, groups or 1)
                found.setdefault(place.key, place)
    return list(found.values())


class _Window:
    """Σ w·dw of the batches since the last cut, a row each.

    Args:
        places: of the whole model. They keep its parameters alive, and with them the keys.
    """

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        self._lies: dict[tuple[int, int], slice] = {}
        self._taken: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._stacked: Tensor | None = None

    def is_of(self, places: Sequence[Place]) -> bool:
        """Whether no parameter was replaced, as Torch-Pruning does when it cuts."""
        return [place.key for place in places] == [place.key for place in self._places]

    def add(self) -> None:
        """One batch. Whether it counts is decided on the device."""
        slopes = _slopes(self._places)
        end = 0
        for place, slope in zip(self._places, slopes, strict=True):
            self._lies[place.key] = slice(end, end := end + len(slope))
        row = torch.cat(slopes)
        finite = row.isfinite().all()
        self._taken.append(torch.where(finite, row, 0.0))
        self._finite.append(finite)
        self._stacked = None

    @property
    def count(self) -> Tensor:
        """Batches that count."""
        return torch.stack(self._finite).sum()

    def rows(self, places: Sequence[Place], name: str) -> list[Tensor]:
        """``[batches, positions]`` of each place."""
        if any(place.key not in self._lies for place in places):
            raise InputError(
                f"{name}: its layers were pruned since update(): call update(model) after the next loss.backward(), "
                "or reset()"
            )
        if self._stacked is None:
            self._stacked = torch.stack(self._taken)
        return [self._stacked[:, self._lies[place.key]] for place in places]
