"""The criteria: what each one measures, and from what. Their arithmetic is in ``estimator``.

Notation: E the mini-batch mean loss; t[n,c] = Σ_l a·g at the inputs of a unit's readers, added up over all of them,
with a the activation and g = dE/da; E' = Σ_n t, the gradient of a gate of 1 on the unit, and E'' its second one;
F = Σ_n E_v[q²], with q the same sums of the backward pass of S·v, S·Sᵀ the Hessian of E in the outputs and v random
signs; d = N·t, the gradient of an example's own loss; w, g the weights that write a unit and their gradients; γ, β the
affine parameters of a normalisation.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from taylor_cuda.errors import InputError

Source = Literal["parameters", "activations", "auto"]


@dataclass(frozen=True)
class Criterion:
    """One way to value a unit.

    Attributes:
        name: what users write.
        formula: importance of one unit after one optimizer step.
        gate: the criterion is the gradient of a gate on the unit, which parameters may give without any activation.
        per_example: needs t[n,c] of every example.
        gradient: needs a backward pass at all.
        reference: where it is defined.
        curvature: where it takes second derivatives from: ``"probe"`` (Gauss-Newton, one more backward pass),
            ``"fisher"`` (squares of examples' gradients, nothing more), ``"hessian"`` (exact, one backward pass a
            unit), or ``""``. E' and the curvature are then averaged over the window each, before anything is squared.
    """

    name: str
    formula: str
    gate: bool
    per_example: bool
    gradient: bool
    reference: str
    curvature: Literal["", "probe", "fisher", "hessian"] = ""

    @property
    def outputs(self) -> bool:
        """Whether it takes ``backward(loss, outputs)``: ``update()`` comes too late, for the graph is gone."""
        return self.curvature in ("probe", "hessian")

    @property
    def gates_inserted(self) -> bool:
        """Whether it multiplies gates into the forward pass."""
        return self.curvature == "hessian"


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("taylor_fo", "(Σ_n t)²", True, False, True, "Molchanov et al. 2019, gate; = (γ·dγ + β·dβ)²"),
        Criterion("taylor_fg", "Σ_n t²", False, True, True, "Molchanov et al. 2019, full gradient"),
        Criterion("taylor_so", "(½F - E')²", False, True, True, "Gauss-Newton form of second order", "probe"),
        Criterion(
            "taylor_so_hessian", "(½E'' - E')²", False, False, True, "Molchanov et al. 2019, second order", "hessian"
        ),
        Criterion("obd", "(½ max(E'', 0))²", False, False, True, "LeCun et al. 1990", "hessian"),
        Criterion("fisher", "(½ mean_n d²)²", False, True, True, "Theis et al. 2018", "fisher"),
        Criterion("taylor_fo_fisher", "(½ mean_n d² - E')²", False, True, True, "both together", "fisher"),
        Criterion("taylor_weight", "Σ (w·g)²", False, False, True, "Molchanov et al. 2019, weights of the filter"),
        Criterion("taylor_filter", "(Σ w·g)²", False, False, True, "Molchanov et al. 2019, the filter as one set"),
        Criterion("bn_taylor", "(γ·dγ + β·dβ)²", False, False, True, "Molchanov et al. 2019, batch normalisation"),
        Criterion("bn_taylor_scale", "(γ·dγ)²", False, False, True, "the same as first published in code, without β"),
        Criterion("taylor_output", "mean_n |t / L| / ‖·‖₂ of the group", False, True, True, "Molchanov et al. 2017"),
        Criterion("magnitude", "Σ w²", False, False, False, "squared L2 norm of the filter"),
        Criterion("bn_scale", "mean |γ|", False, False, False, "Liu et al. 2017, network slimming"),
        Criterion("random", "uniform in [0, 1)", False, False, False, "the floor every criterion has to beat"),
    )
}


def find_criterion(name: str) -> Criterion:
    """The criterion of that name, or an error that lists them."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(str(name), CRITERIA, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"criterion: wanted one of {', '.join(CRITERIA)}, got {name!r}{hint}")
    return CRITERIA[name]


def check_source(source: str, criterion: Criterion) -> None:
    """Raise unless ``criterion`` can be taken from ``source``."""
    if source not in ("parameters", "activations", "auto"):
        raise InputError(f"source: wanted 'parameters', 'activations' or 'auto', got {source!r}")
    if source == "parameters" and criterion.gates_inserted:
        raise InputError(f"source: {criterion.name!r} needs gates in the model; use source='activations' or 'auto'")
    if source == "parameters" and criterion.per_example:
        raise InputError(
            f"source: {criterion.name!r} needs the sums of every example, which parameter gradients no longer hold; "
            "use source='activations' or 'auto'"
        )
    if source == "activations" and not (criterion.gate or criterion.per_example or criterion.gates_inserted):
        raise InputError(f"source: {criterion.name!r} is a function of parameters; use source='parameters' or 'auto'")


def check_norm_term(source: str, criterion: Criterion) -> None:
    """Raise unless the norm term can be added to ``criterion`` taken from ``source``."""
    if criterion.name != "taylor_fo":
        raise InputError(f"norm_term: wanted criterion='taylor_fo', whose gate it belongs to, got {criterion.name!r}")
    if source == "parameters":
        raise InputError(
            "norm_term: wanted source='activations' or 'auto', for it needs the inputs of normalisations, "
            "got source='parameters'"
        )


def check_shared_norm(shared_norm: str, criterion: Criterion) -> str:
    """Raise unless scores under ``criterion`` can be divided in this way."""
    if shared_norm not in ("none", "blocks"):
        raise InputError(f"shared_norm: wanted 'none' or 'blocks', got {shared_norm!r}")
    if shared_norm == "blocks" and criterion.name != "taylor_fo":
        raise InputError(f"shared_norm: wanted criterion='taylor_fo' with 'blocks', got {criterion.name!r}")
    return shared_norm
