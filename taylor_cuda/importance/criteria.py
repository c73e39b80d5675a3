"""The criteria: what each one measures, and from what. Their arithmetic is in ``estimator``.

Notation: E the mini-batch mean loss; z a gate of 1 on the unit where its readers take it; t[n,c] = Σ_l a·g at the
inputs of a unit's readers, added up over all of them, with a the activation and g = dE/da, so dE/dz = Σ_n t, and
d_n = N·t_n the same of an example's own loss; w, g the weights that write a unit and their gradients; γ, β the affine
parameters of a normalisation; F the Gauss-Newton diagonal, H_zz the Hessian's. Scores that are made of dE/dz or of
curvature are squares of a predicted change of the loss.
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
        outputs: ``backward(loss, outputs)`` needs the outputs, and ``update()`` is not enough.
        hessian: ``backward(loss)`` differentiates the loss twice, and ``update()`` is not enough.
        averaged: dE/dz and the curvature are averaged over the window, which is squared afterwards.
    """

    name: str
    formula: str
    gate: bool
    per_example: bool
    gradient: bool
    reference: str
    outputs: bool = False
    hessian: bool = False
    averaged: bool = False


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("taylor_fo", "(Σ_n t)²", True, False, True, "Molchanov et al. 2019, gate; = (γ·dγ + β·dβ)²"),
        Criterion("taylor_fg", "Σ_n t²", False, True, True, "Molchanov et al. 2019, full gradient"),
        Criterion("taylor_weight", "Σ (w·g)²", False, False, True, "Molchanov et al. 2019, weights of the filter"),
        Criterion("taylor_filter", "(Σ w·g)²", False, False, True, "Molchanov et al. 2019, the filter as one set"),
        Criterion("bn_taylor", "(γ·dγ + β·dβ)²", False, False, True, "Molchanov et al. 2019, gate at a normalisation"),
        Criterion("bn_taylor_scale", "(γ·dγ)²", False, False, True, "the same as first published in code, without β"),
        Criterion("taylor_output", "mean_n |t / L| / ‖·‖₂ of the group", False, True, True, "Molchanov et al. 2017"),
        Criterion("fisher", "(½ mean_n d²)²", False, True, True, "Theis et al. 2018", averaged=True),
        Criterion(
            *("taylor_fo_fisher", "(−dE/dz + ½ mean_n d²)²", False, True, True),
            "second order with the empirical Fisher diagonal for H_zz",
            averaged=True,
        ),
        Criterion(
            *("taylor_so", "(−dE/dz + ½ F)²", False, True, True),
            "second order with the Gauss-Newton diagonal for H_zz, estimated by one more backward pass",
            outputs=True,
            averaged=True,
        ),
        Criterion(
            *("taylor_so_hessian", "(−dE/dz + ½ H_zz)²", False, False, True),
            "Molchanov et al. 2019, second order; a backward pass for every unit",
            hessian=True,
            averaged=True,
        ),
        Criterion(
            *("obd", "(½ max(H_zz, 0))²", False, False, True),
            "LeCun et al. 1990, for gates; a backward pass for every unit",
            hessian=True,
            averaged=True,
        ),
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
    if source == "parameters" and criterion.per_example:
        raise InputError(
            f"source: {criterion.name!r} needs the sums of every example, which parameter gradients no longer hold; "
            "use source='activations' or 'auto'"
        )
    if source == "activations" and not (criterion.gate or criterion.per_example):
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
