"""Loss against width: by hand on a linear network, against real cuts on a residual one, and what the cache keeps."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.study import sensitivity as module_function
from taylor_cuda.study.sensitivity import sensitivity
from tests.study.test_compare import EFFECTS, by_hand, half_square, small_net


def counting(loss_fn):
    """The loss function, and a list that grows at every call."""
    calls = []

    def counted(outputs, targets):
        calls.append(1)
        return loss_fn(outputs, targets)

    return counted, calls


def test_by_hand():
    model, groups, batches = by_hand()
    found = sensitivity(model, groups, half_square, batches, fractions=(0.25, 0.5, 0.75))
    assert found.intact == pytest.approx(0.5, abs=1e-12)
    assert found.fractions == (0.75, 0.5, 0.25)
    assert found.kept == {"first": [3, 2, 1]}
    # by |effect| 0.1, 0.5 and 1 go one after the other, and the residual of 1 loses their sum
    assert found.losses["first"] == pytest.approx([0.5 * (1 - gone) ** 2 for gone in (0.1, 0.6, 1.6)], abs=1e-12)
    assert "0.75" in found.table()


def test_scores_that_are_given_decide():
    model, groups, batches = by_hand()
    found = sensitivity(model, groups, half_square, batches, {"first": -EFFECTS}, fractions=(0.75, 0.5))
    assert found.losses["first"] == pytest.approx([0.0, 0.5 * 0.5**2], abs=1e-12)  # 1 goes, then 0.5


def test_groups_are_narrowed_alone_and_as_a_cut_does_it():
    model, groups, batches = small_net()
    found = sensitivity(model, groups, F.cross_entropy, batches, criterion="magnitude", fractions=(0.5, 0.25))
    scores = tc.Importance(model, groups, "magnitude").scores()
    for group in groups:
        twin = copy.deepcopy(model).eval()
        own = tc.trace(twin, batches[0][0])
        kept = scores[group.name].argsort(descending=True)[: group.size // 2].sort().values
        tc.cut(twin, own, {group.name: kept})
        with torch.no_grad():
            losses = [len(targets) * F.cross_entropy(twin(inputs), targets) for inputs, targets in batches]
        assert found.losses[group.name][0] == pytest.approx(float(sum(losses)) / 9, rel=1e-5)
        assert found.kept[group.name] == [group.size // 2, group.size // 4]


def test_widths_that_come_twice_are_measured_once():
    model, groups, batches = by_hand()
    loss_fn, calls = counting(half_square)
    found = sensitivity(model, groups, loss_fn, batches, {"first": EFFECTS}, fractions=(0.9, 0.6, 0.55, 0.5, 0.1))
    assert found.kept["first"] == [4, 2, 2, 2, 1]  # a half is rounded up, and one unit stays
    assert found.losses["first"][0] == found.intact
    assert len(calls) == 3 * len(batches)


def test_it_stops_where_the_loss_explodes():
    model, groups, batches = by_hand()
    loss_fn, calls = counting(half_square)
    scores = {"first": -EFFECTS.abs()}  # the largest goes first: residual 3
    found = sensitivity(model, groups, loss_fn, batches, scores, fractions=(0.75, 0.5, 0.25), stop_above=2.0)
    assert found.losses["first"][0] == pytest.approx(4.5, abs=1e-12)
    assert all(math.isnan(loss) for loss in found.losses["first"][1:])
    assert len(calls) == 2 * len(batches)
    assert found.to_dict()["losses"]["first"][1:] == [None, None]
    assert found.table().splitlines()[-1].split() == ["first", "4.5", "-", "-"]


def test_cache_answers_for_the_same_and_for_nothing_else(tmp_path):
    model, groups, batches = by_hand()
    path = tmp_path / "sensitivity.json"
    loss_fn, calls = counting(half_square)
    scores = {"first": EFFECTS.abs()}

    def measured(**changes):
        calls.clear()
        options = {"scores": scores, "fractions": (0.75, 0.5), "batches": batches, "cache": path, **changes}
        found = sensitivity(model, groups, loss_fn, **options)
        return found, len(calls) // len(options["batches"])

    first, passes = measured()
    assert passes == 3
    again, passes = measured()
    assert (again, passes) == (first, 1)  # the intact loss is always taken: it tells one loss from another
    assert measured(scores={"first": -EFFECTS})[1] == 3
    assert measured(fractions=(0.75, 0.25))[1] == 3
    assert measured(stop_above=1.0)[1] == 3
    assert measured(batches=[(inputs * 2, targets) for inputs, targets in batches])[1] == 3
    assert measured(batches=[(-inputs, -targets) for inputs, targets in batches])[1] == 3  # of the same intact loss
    with torch.no_grad():
        model.last.weight[0, 0] += 1e-9
    assert measured()[1] == 3
    with torch.no_grad():
        model.last.weight[0, 0] -= 1e-9
    assert measured(scores=dict(scores))[0].kept == first.kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["sensitivity.json"]


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    model, groups, batches = small_net()
    path = tmp_path / "sensitivity.json"
    whole = sensitivity(model, groups, F.cross_entropy, batches, criterion="magnitude", fractions=(0.5,))
    calls = []

    def interrupted(outputs, targets):
        calls.append(1)
        if len(calls) == 7:  # after the intact model and two groups
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    arguments = (batches, None)
    options = {"criterion": "magnitude", "fractions": (0.5,), "cache": path}
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, groups, interrupted, *arguments, **options)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    (entry,) = json.loads(path.read_text(encoding="utf-8"))["sensitivity"].values()
    assert list(entry) == [group.name for group in groups][:2]
    loss_fn, calls = counting(F.cross_entropy)
    assert sensitivity(model, groups, loss_fn, *arguments, **options) == whole
    assert len(calls) == len(batches) * (1 + len(groups) - 2)


def test_saved_as_json(tmp_path):
    model, groups, batches = by_hand()
    found = sensitivity(model, groups, half_square, batches, fractions=(0.5,))
    found.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == found.to_dict()


def test_bad_input(tmp_path):
    model, groups, batches = by_hand()
    for fractions in ((), (1.0,), (0.0, 0.5)):
        with pytest.raises(InputError, match="fractions: wanted numbers above 0 and below 1"):
            sensitivity(model, groups, half_square, batches, fractions=fractions)
    for scores, got in (({}, "none"), ({"first": EFFECTS[:3]}, r"shape \[3\]"), ({"first": EFFECTS * math.nan}, "NaN")):
        with pytest.raises(InputError, match=rf"scores: wanted 4 numbers for group 'first', got {got}"):
            sensitivity(model, groups, half_square, batches, scores)
    with pytest.raises(InputError, match="at least one example"):
        sensitivity(model, groups, half_square, [], {"first": EFFECTS})
    for text in ("{", "[]", '{"sensitivity": 3}'):
        (tmp_path / "cache.json").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"cache: .*cache\.json isn't what tc\.sensitivity writes"):
            sensitivity(model, groups, half_square, batches, cache=tmp_path / "cache.json")


def test_public_name():
    assert tc.sensitivity is module_function
