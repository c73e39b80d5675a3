"""Correlations against values worked out by hand, and against counting every pair."""

import itertools
import math

import pytest
import torch

from taylor_cuda.errors import InputError
from taylor_cuda.study.correlation import agreement, kendall, pearson, spearman

ALL = (pearson, spearman, kendall)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(size, levels, seed):
    """Two related vectors; with few levels there are ties in either, and in both at once."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    y = 0.5 * x + torch.randn(size, generator=generator, dtype=torch.float64)
    return (x, y) if levels is None else ((x * levels).round(), (y * levels).round())


def test_by_hand():
    x, y = vector(1, 2, 3, 4, 5), vector(2, 1, 4, 3, 5)
    # deviations (-2, -1, 0, 1, 2) and (-1, -2, 1, 0, 2): 2 + 2 + 0 + 0 + 4 over 10
    assert pearson(x, y) == pytest.approx(0.8, abs=1e-15)
    assert spearman(x, y) == pytest.approx(0.8, abs=1e-15)
    assert kendall(x, y) == pytest.approx((8 - 2) / 10, abs=1e-15)
    # not the same thing: deviations (-1.5, -0.5, 0.5, 1.5) and (-7.5, -6.5, -4.5, 18.5), ranks in order
    x, y = vector(1, 2, 3, 4), vector(1, 2, 4, 27)
    product, lengths = 1.5 * 7.5 + 0.5 * 6.5 - 0.5 * 4.5 + 1.5 * 18.5, 5 * (7.5**2 + 6.5**2 + 4.5**2 + 18.5**2)
    assert pearson(x, y) == pytest.approx(product / math.sqrt(lengths), abs=1e-15)
    assert spearman(x, y) == pytest.approx(1.0, abs=1e-15)
    assert kendall(x, y) == 1.0


def test_ties_by_hand():
    x, y = vector(1, 2, 2, 3), vector(4, 4, 5, 6)
    # ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4: deviations (-1.5, 0, 0, 1.5) and (-1, -1, 0.5, 1.5)
    assert spearman(x, y) == pytest.approx(3.75 / math.sqrt(4.5 * 4.5), abs=1e-15)
    # six pairs: one tied in x, one in y, four in the same order
    assert kendall(x, y) == pytest.approx(4 / math.sqrt(5 * 5), abs=1e-15)


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("size", [2, 3, 17, 64])
def test_kendall_is_the_count_over_pairs(size, levels):
    for seed in range(8):
        x, y = drawn(size, levels, seed)
        signs = [(x[i] - x[j]).sign() * (y[i] - y[j]).sign() for i, j in itertools.combinations(range(size), 2)]
        free = [sum(bool(v[i] != v[j]) for i, j in itertools.combinations(range(size), 2)) for v in (x, y)]
        expected = float(sum(signs)) / math.sqrt(free[0] * free[1]) if min(free) else math.nan
        assert kendall(x, y) == pytest.approx(expected, abs=1e-14, nan_ok=True)


@pytest.mark.parametrize("levels", [None, 1, 4])
def test_scipy_says_the_same(levels):
    stats = pytest.importorskip("scipy.stats")
    x, y = drawn(500, levels, 11)
    for ours, theirs in zip(ALL, (stats.pearsonr, stats.spearmanr, stats.kendalltau), strict=True):
        assert ours(x, y) == pytest.approx(theirs(x.numpy(), y.numpy())[0], abs=1e-13)


@pytest.mark.parametrize("function", ALL)
def test_what_does_not_change_it(function):
    x, y = drawn(40, None, 3)
    value = function(x, y)
    assert function(y, x) == pytest.approx(value, abs=1e-14)
    assert function(x, -y) == pytest.approx(-value, abs=1e-14)
    assert function(3 * x + 1, 1e-200 * y) == pytest.approx(value, abs=1e-13)
    assert function(x, x) == pytest.approx(1.0, abs=1e-15)
    assert function(x.float(), y) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("x", "y"),
    [((1, 1, 1), (1, 2, 3)), ((1, 2, 3), (2, 2, 2)), ((1, math.nan, 3), (1, 2, 3)), ((1,), (2,)), ((), ())],
    ids=["constant", "constant truth", "nan", "one", "none"],
)
def test_undefined_is_nan(function, x, y):
    assert math.isnan(function(vector(*x), vector(*y)))


def test_many_units_take_no_square_of_memory_or_time():
    x, y = drawn(20_000, None, 5)
    # of a bivariate normal with r = 0.5 / √1.25: τ = 2/π · asin r
    assert kendall(x, y) == pytest.approx(2 / math.pi * math.asin(0.5 / math.sqrt(1.25)), abs=0.02)


def test_groups_alone_and_together():
    estimate = {"a": vector(1, 2, 3), "b": vector(30, 20, 10), "c": vector(5, 5)}
    truth = {"a": vector(1, 2, 3), "b": vector(1, 2, 3), "c": vector(1, 2)}
    found = agreement(estimate, truth)
    assert found.by_group["a"].kendall == 1.0
    assert found.by_group["b"].kendall == -1.0
    assert math.isnan(found.by_group["c"].pearson)
    assert found.mean.pearson == pytest.approx(0.0, abs=1e-15)
    assert found.defined == 2
    joined = [torch.cat([side[name] for name in "abc"]) for side in (estimate, truth)]
    assert found.overall.spearman == spearman(*joined)
    assert found.overall.kendall == kendall(*joined)
    assert abs(found.overall.pearson) < 1


def test_layers_whose_scale_is_off_are_right_alone_and_wrong_together():
    truth = {"a": vector(1, 2, 3), "b": vector(100, 200, 300)}
    found = agreement({"a": vector(1, 2, 3), "b": vector(0.01, 0.02, 0.03)}, truth)
    assert found.mean.kendall == 1.0
    assert found.overall.kendall == pytest.approx((6 - 9) / 15)


def test_no_group_is_defined():
    found = agreement({"a": vector(1, 1)}, {"a": vector(1, 2)})
    assert math.isnan(found.mean.spearman)
    assert found.defined == 0


@pytest.mark.parametrize(
    ("estimate", "truth", "says"),
    [
        ({}, {}, "at least one"),
        ({"a": vector(1, 2)}, {"b": vector(1, 2)}, "the same groups"),
        ({"a": vector(1, 2)}, {"a": vector(1, 2, 3)}, r"group 'a', got \[2\] and \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused(estimate, truth, says):
    with pytest.raises(InputError, match=says):
        agreement(estimate, truth)


def test_matrices_are_refused():
    with pytest.raises(InputError, match="two vectors"):
        spearman(torch.zeros(2, 2), torch.zeros(2, 2))
