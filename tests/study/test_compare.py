"""Criteria beside the oracle: on a network whose every number can be worked out by hand, and on small real ones."""

import copy
import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.importance import CRITERIA, Importance
from taylor_cuda.study import compare as study_compare
from taylor_cuda.study.compare import compare, criteria_named, score
from taylor_cuda.study.correlation import agreement
from taylor_cuda.train.models import DigitsResNet


class Linear(nn.Module):
    """y = Σ_c v_c · u_c · x: removing hidden unit c takes v_c·u_c·x away from the output."""

    def __init__(self, u, v):
        super().__init__()
        self.first, self.last = (
            nn.Linear(*shape, bias=False, dtype=torch.float64) for shape in ((1, len(u)), (len(u), 1))
        )
        with torch.no_grad():
            self.first.weight.copy_(u[:, None])
            self.last.weight.copy_(v[None])

    def forward(self, x):
        return self.last(self.first(x))


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def by_hand():
    """Model, groups, batches of different sizes; the residual of every example is 1 and x² is 1 on average of each."""
    u, v = [1.0, 2.0, -1.0, 0.5], [1.0, 0.25, 2.0, 0.2]
    model = Linear(*(torch.tensor(part, dtype=torch.float64) for part in (u, v)))
    total = 1.0 + 0.5 - 2.0 + 0.1
    x = [torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)]
    batches = [(part, total * part - 1.0) for part in x]
    return model, tc.trace(model, x[0]), batches


EFFECTS = torch.tensor([1.0, 0.5, -2.0, 0.1], dtype=torch.float64)
"""What each unit adds to the output: without it the residual is 1 - effect."""


def test_truth_and_first_order_by_hand():
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, batches, ["taylor_fo", "magnitude"], budgets={"channels": (0.75, 0.5)})
    change = 0.5 * (1 - EFFECTS).square() - 0.5
    assert list(found.truth) == [groups.groups[0].name]
    assert torch.allclose(found.truth["first"], change, atol=1e-12)
    assert found.intact.loss == pytest.approx(0.5, abs=1e-12)
    # dE/dz of a unit is residual · effect
    assert torch.allclose(found["taylor_fo"].scores["first"].double(), EFFECTS.square(), rtol=1e-6)
    assert torch.allclose(found["magnitude"].scores["first"], torch.tensor([1.0, 4.0, 1.0, 0.25]))
    expected = agreement({"first": EFFECTS.square().float()}, {"first": change.square()})
    assert found["taylor_fo"].agreement.overall.kendall == expected.overall.kendall
    assert found["taylor_fo"].agreement.overall.pearson == pytest.approx(expected.overall.pearson, abs=1e-6)
    assert (found.examples, found.batches) == (4, 2)


def test_losses_right_after_removal_by_hand():
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, batches, ["taylor_fo"], budgets={"channels": (0.75, 0.5), "macs": 0.25})
    assert list(found["taylor_fo"].after) == ["channels=0.75", "channels=0.5", "macs=0.25"]
    # by |effect|: 0.1 goes first, then 0.5, then 1; true changes: 0.1: -0.095, 0.5: -0.375, 1: -0.5, -2: 4
    losses = [after.loss for after in found["taylor_fo"].after.values()]
    assert losses == pytest.approx([0.5 * 0.9**2, 0.5 * 0.4**2, 0.5 * 0.6**2], abs=1e-12)
    oracle = [after.loss for after in found.oracle_after.values()]
    assert oracle == losses  # squares of -0.095, -0.375 and -0.5 give the same order


def test_metric_is_taken_wherever_the_loss_is():
    model, groups, batches = by_hand()

    def residual(outputs, targets):
        return (outputs - targets).mean()

    found = compare(model, groups, half_square, batches, ["taylor_fo"], budgets={"channels": 0.75}, metric=residual)
    assert found.intact.metric == pytest.approx(1.0)
    assert found["taylor_fo"].after["channels=0.75"].metric == pytest.approx(0.9)
    assert "(0.9)" in found.table()


def small_net(seed=0):
    torch.manual_seed(seed)
    model = DigitsResNet(width=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 2.0)
                module.running_mean.normal_(0, 0.1)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator))
        for size in (6, 3)
    ]
    return model, tc.trace(model, batches[0][0]), batches


def test_everything_on_a_small_residual_network():
    model, groups, batches = small_net()
    found = compare(model, groups, F.cross_entropy, batches, "all", budgets={"macs": (0.9, 0.5)})
    assert {row.criterion for row in found.rows} == set(CRITERIA)
    assert [row.reason for row in found.rows] == [""] * len(CRITERIA)
    truth = tc.oracle(model, groups, F.cross_entropy, batches)
    assert all(torch.equal(change, found.truth[name]) for name, change in truth.items())
    order = [row.agreement.overall.spearman for row in found.rows if not math.isnan(row.agreement.overall.spearman)]
    assert order == sorted(order, reverse=True)
    assert all(row.seconds >= 0 for row in found.rows)
    assert all(row.relative == row.seconds / row.pass_seconds for row in found.rows)
    assert found.pass_seconds == statistics.median(row.pass_seconds for row in found.rows)


def test_scores_are_those_of_one_pass_in_eval_mode():
    model, groups, batches = small_net()
    twin = copy.deepcopy(model).eval()
    estimator = Importance(twin, groups, "taylor_fo")
    for inputs, targets in batches:
        estimator.backward(F.cross_entropy(twin(inputs), targets))
        twin.zero_grad()
    scores, seconds = score(model, groups, F.cross_entropy, batches, "taylor_fo")
    assert all(torch.equal(values, scores[name]) for name, values in estimator.scores().items())
    assert seconds > 0


class Watched(DigitsResNet):
    """Counts, and refuses to be changed."""

    def state(self):
        tensors = {name: value.clone() for name, value in self.state_dict().items()}
        modes = [module.training for module in self.modules()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules())
        grads = [None if p.grad is None else p.grad.clone() for p in self.parameters()]
        return tensors, modes, hooks, grads, [p.requires_grad for p in self.parameters()]


def same(a, b):
    tensors = all(torch.equal(value, b[0][name]) for name, value in a[0].items())
    grads = all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a[3], b[3], strict=True)
    )
    return tensors and grads and a[1] == b[1] and a[2] == b[2] and a[4] == b[4]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_is(fails):
    _, _, batches = small_net()
    torch.manual_seed(1)
    model = Watched(width=4)
    model.train()
    model.stage1[0].bn1.eval()
    model.stem[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    groups = tc.trace(model, batches[0][0])
    before, state, enabled = model.state(), torch.get_rng_state(), torch.is_grad_enabled()
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        if fails and len(calls) > 60:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            compare(model, groups, loss_fn, batches)
    else:
        compare(model, groups, loss_fn, batches)
    assert same(before, model.state())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() == enabled


def test_a_frozen_model_is_compared_like_any_other():
    model, groups, batches = small_net()
    wanted = compare(model, groups, F.cross_entropy, batches, ["taylor_fo"], budgets={})
    model.requires_grad_(False)
    found = compare(model, groups, F.cross_entropy, batches, ["taylor_fo"], budgets={})
    expected = wanted["taylor_fo"].scores
    assert all(torch.equal(values, expected[name]) for name, values in found["taylor_fo"].scores.items())


def test_what_a_model_cannot_have_is_a_row_with_the_reason():
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, batches, ["bn_scale", "taylor_fo"], budgets={"channels": 0.75})
    assert [row.criterion for row in found.rows] == ["taylor_fo", "bn_scale"]
    assert "no normalisation with a scale" in found["bn_scale"].reason
    assert "bn_scale: not on this model: criterion='bn_scale'" in found.table()
    with pytest.raises(KeyError, match="no criterion 'fisher'"):
        found["fisher"]


def test_a_budget_that_cannot_be_met_is_said():
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, batches, ["taylor_fo"], budgets={"channels": (0.5, 0.1)})
    assert found["taylor_fo"].after["channels=0.1"] is None
    assert "not possible" in found.table()


def test_a_truth_that_is_given_is_used():
    model, groups, batches = by_hand()
    truth = {"first": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    found = compare(model, groups, half_square, batches, ["magnitude"], truth=truth, budgets={})
    expected = agreement({"first": torch.tensor([1.0, 4.0, 1.0, 0.25])}, {"first": truth["first"].square()})
    assert found["magnitude"].agreement == expected
    with pytest.raises(InputError, match="group 'first'"):
        compare(model, groups, half_square, batches, truth={"first": torch.ones(3)})


def test_batches_that_come_once_are_kept():
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, iter(batches), ["taylor_fo"], budgets={})
    assert found.examples == 4


def test_json_has_everything(tmp_path):
    model, groups, batches = by_hand()
    found = compare(model, groups, half_square, batches, ["taylor_fo", "bn_scale"], budgets={"channels": 0.75})
    found.save(tmp_path / "comparison.json")
    read = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["comparison.json"]
    row, missing = read["rows"]
    assert row["agreement"]["overall"]["spearman"] == found["taylor_fo"].agreement.overall.spearman
    assert row["after"]["channels=0.75"]["loss"] == found["taylor_fo"].after["channels=0.75"].loss
    assert row["scores"]["first"] == pytest.approx(EFFECTS.square().tolist())
    assert missing["seconds"] is None
    assert missing["agreement"] is None
    assert read["truth"]["first"] == found.truth["first"].tolist()


def test_names():
    assert criteria_named("all") == list(CRITERIA)
    assert criteria_named(None) == [name for name in CRITERIA if name not in ("taylor_so_hessian", "obd")]
    assert criteria_named("magnitude") == ["magnitude"]
    assert criteria_named(["random", "magnitude", "random"]) == ["random", "magnitude"]
    with pytest.raises(InputError, match="did you mean 'magnitude'"):
        criteria_named(["magnitud"])
    with pytest.raises(InputError, match="at least one name"):
        criteria_named([])


def test_bad_input():
    model, groups, batches = by_hand()
    with pytest.raises(InputError, match="at least one example"):
        compare(model, groups, half_square, [])
    with pytest.raises(InputError, match="unknown 'flops'"):
        compare(model, groups, half_square, batches, budgets={"flops": 0.5})
    with pytest.raises(InputError, match="compare: groups"):
        compare(model, {}, half_square, batches)


def test_public_name():
    assert tc.compare is study_compare
