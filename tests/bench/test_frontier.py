from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from taylor_cuda.bench.coverage.table import append
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.frontier import __main__ as command
from taylor_cuda.bench.frontier import methods, point
from taylor_cuda.bench.frontier.figure import STYLES, spaced, write_figure
from taylor_cuda.bench.frontier.forms import FORMS, Form
from taylor_cuda.bench.frontier.network import SmallImageResNet18, macs
from taylor_cuda.bench.frontier.table import IDENTITY, curves, finished, markdown, newest
from taylor_cuda.bench.rows import read_rows
from taylor_cuda.errors import InputError, TaylorError

CPU = torch.device("cpu")
TINY = Form(
    name="tiny",
    width=8,
    size=8,
    classes=6,
    batch=8,
    test_images=32,
    seeds=(0,),
    budgets=(0.6,),
    base_steps=3,
    base_rate=0.05,
    every=2,
    prune_steps=2,
    prune_rate=0.01,
    finetune_steps=3,
    finetune_rate=0.02,
)
TWO = ("ours:taylor_fo", "ours:magnitude")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return point.Task(TINY, CPU, tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def base(task, tmp_path_factory):
    return point.base_network(task, 0, tmp_path_factory.mktemp("base"))[0]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs the command on the tiny form; its rows so far come back."""
    monkeypatch.setitem(FORMS, "tiny", TINY)

    def run(*arguments, status=0):
        given = ["--form", "tiny", "--device", "cpu", "--results", str(tmp_path / "results")]
        assert command.main([*given, "--work", str(tmp_path / "work"), *arguments]) == status
        return read_rows(tmp_path / "results")

    return run


def make_row(provider, budget, seed=0, accuracy=0.5, **changes):
    row = {
        "suite": "frontier",
        "op": "prune",
        "case": "tiny",
        "settings": TINY.settings(),
        "base": f"base{seed}",
        "seed": seed,
        "provider": provider,
        "budget": budget,
        "macs_before": 1_000_000,
        "macs": budget,
        "accuracy_base": 0.9,
        "accuracy_cut": accuracy / 2,
        "accuracy": accuracy,
        "seconds_removing": 1.0,
        "seconds_pruning": 4.0,
    }
    return row | environment("cpu") | changes


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_network_is_resnet18_for_small_images():
    model = SmallImageResNet18(64, 10)
    # the 555,422,720 of three input channels, less those of two in the stem
    assert macs(model, 32) == 555_422_720 - 2 * 64 * 9 * 32 * 32
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len([m for m in layers if getattr(m, "kernel_size", (3, 3)) == (3, 3)]) == 18
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_counting_changes_nothing():
    model = SmallImageResNet18(4, 3)
    before = copy.deepcopy(model.state_dict())
    assert macs(model, 8) > 0
    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# -- one point ---------------------------------------------------------------------------------------------------------


class Recorded:
    """A way to prune that only writes down what it is given."""

    def __init__(self, start):
        self.model, self.optimizer = start.model, start.form.sgd(start.model, 0.01)
        self.images, self.removals, self.modes = [], 0, []
        self.batches = 0
        self.model.register_forward_pre_hook(self._see)

    def _see(self, module, inputs):
        if module.training:
            self.images.append(inputs[0].clone())
            self.modes.append(module.training)

    def backward(self, loss, logits):
        loss.backward()

    def step(self):
        self.batches += 1


def test_every_method_gets_the_same_steps_and_batches(task, base, monkeypatch):
    monkeypatch.setattr(point, "WITHIN", 1.0)  # nothing is removed here
    seen = []
    for _ in range(2):
        made = []
        monkeypatch.setattr(point, "macs", lambda model, size: 0 if model is not base else 10)
        row = point.run_point(
            task, base, task.quality(base), 0, lambda start, made=made: made.append(Recorded(start)) or made[0], 0.5
        )
        seen.append(made[0])
        assert row["macs"] == 0
    steps = TINY.every * TINY.prune_steps + TINY.finetune_steps
    assert seen[0].batches == TINY.every * TINY.prune_steps
    assert len(seen[0].images) == steps
    assert all(one.equal(other) for one, other in zip(seen[0].images, seen[1].images, strict=True))
    expected = [images for images, _ in itertools.islice(task.batches(0, base=False), steps)]
    assert all(one.equal(other) for one, other in zip(seen[0].images, expected, strict=True))


def test_images_of_base_pruning_seeds_and_test_are_others(task, tmp_path):
    firsts = [next(task.batches(seed, base))[0] for seed in (0, 1) for base in (True, False)]
    assert not any(one.equal(other) for one, other in itertools.combinations(firsts, 2))
    again = point.Task(TINY, CPU, tmp_path)
    assert all(a.equal(b) for (a, _), (b, _) in zip(task._test, again._test, strict=True))
    assert sum(len(labels) for _, labels in task._test) == TINY.test_images
    assert again.settings == task.settings
    other = point.Task(replace(TINY, size=7), CPU, tmp_path)
    assert other.settings["images"] != task.settings["images"]


@pytest.mark.parametrize("provider", [name for name in methods.methods() if name.startswith("ours")])
def test_ours_meets_the_budget_from_a_base_it_leaves_alone(task, base, provider):
    before = copy.deepcopy(base.state_dict())
    row = point.run_point(task, base, task.quality(base), 0, methods.methods()[provider], 0.6)
    assert 0.594 <= row["macs"] <= 0.6
    assert row["macs"] == row["macs_after"] / macs(base, TINY.size)
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert all(math.isfinite(row[key]) for key in ("accuracy_base", "accuracy_cut", "accuracy", "loss_cut", "loss"))
    assert 0 < row["seconds_removing"] <= row["seconds_pruning"] <= row["seconds"]
    again = point.run_point(task, base, task.quality(base), 0, methods.methods()[provider], 0.6)
    assert [again[key] for key in ("accuracy_cut", "accuracy", "widths")] == [
        row[key] for key in ("accuracy_cut", "accuracy", "widths")
    ]


def test_a_point_that_costs_something_else_has_no_row(task, base):
    with pytest.raises(TaylorError, match=r"budget: wanted 50.0% of the MACs to within 1%, got 100.00%"):
        point.run_point(task, base, task.quality(base), 0, Recorded, 0.5)


@pytest.mark.parametrize(("costs", "tries"), [([495], 1), ([505], 1), ([494, 505], 2), ([480, 494, 495], 3)])
def test_a_network_that_costs_too_little_is_pruned_anew(task, base, monkeypatch, costs, tries):
    left, made = list(costs), []
    monkeypatch.setattr(point, "macs", lambda model, size: 1000 if model is base else left.pop(0))
    method = lambda start: made.append(Recorded(start)) or made[-1]  # noqa: E731
    row = point.run_point(task, base, task.quality(base), 0, method, 0.5)
    assert (len(made), row["macs_after"]) == (tries, costs[-1])
    assert row["asked"] == 0.5 * (1.0, 1.005, 1.01)[tries - 1]
    assert made[0].images[0].equal(made[-1].images[0])


@pytest.mark.parametrize("costs", [[506], [494, 506], [494, 494, 494]])
def test_a_network_that_costs_too_much_or_never_enough_has_no_row(task, base, monkeypatch, costs):
    monkeypatch.setattr(point, "macs", lambda model, size: 1000 if model is base else costs.pop(0))
    with pytest.raises(TaylorError, match="budget: wanted"):
        point.run_point(task, base, task.quality(base), 0, Recorded, 0.5)
    assert not costs


def test_the_momentum_starts_anew_after_a_removal(base):
    start = methods.Start(TINY, copy.deepcopy(base), 0.6, 0)
    removal = methods.Ours("magnitude", start)
    for step in range(1, TINY.every + 1):
        logits = removal.model(torch.randn(8, 1, 8, 8))
        removal.backward(F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64)), logits)
        del logits
        removal.optimizer.step()
        removal.optimizer.zero_grad()
        assert removal.optimizer.state
        removal.step()
        assert bool(removal.optimizer.state) == (step < TINY.every)


def test_random_is_drawn_until_the_cost_is_right(base, monkeypatch):
    plans = []

    def drawn(*arguments, **keywords):
        plans.append(methods_plan(*arguments, **keywords))
        return plans[-1] if len(plans) > 2 else replace(plans[-1], cost=replace(plans[-1].cost, macs=0))

    methods_plan = methods.plan
    monkeypatch.setattr(methods, "plan", drawn)
    removal = methods.Random(methods.Start(replace(TINY, every=1, prune_steps=1), copy.deepcopy(base), 0.6, 0))
    logits = removal.model(torch.randn(8, 1, 8, 8))
    removal.backward(logits.sum(), logits)
    del logits
    removal.optimizer.step()
    removal.step()
    assert len(plans) >= 3
    assert plans[-1].keep.keys() == plans[0].keep.keys()
    assert macs(removal.model, TINY.size) == plans[-1].cost.macs
    assert not removal.optimizer.state


# -- Torch-Pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["torch-pruning:taylor", "torch-pruning:magnitude"])
@pytest.mark.parametrize("budget", [0.6, 0.3])
def test_the_peer_meets_the_same_budget(task, base, provider, budget):
    pytest.importorskip("torch_pruning")
    before = copy.deepcopy(base.state_dict())
    row = point.run_point(task, base, task.quality(base), 0, methods.methods()[provider], budget)
    assert 0.99 * budget <= row["macs"] <= budget
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())


def test_the_peer_gets_the_sum_of_the_gradients_of_the_window(base, monkeypatch):
    pytest.importorskip("torch_pruning")
    peer = methods.Peer("GroupTaylorImportance", True, methods.Start(TINY, copy.deepcopy(base), 0.6, 0))
    expected = [torch.zeros_like(parameter) for parameter in peer.model.parameters()]
    found = []
    monkeypatch.setattr(peer, "_shrink", lambda target: found.extend(p.grad.clone() for p in peer.model.parameters()))
    for seed in range(TINY.every):
        logits = peer.model(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
        peer.backward(F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64)), logits)
        for total, parameter in zip(expected, peer.model.parameters(), strict=True):
            total += parameter.grad
        peer.optimizer.zero_grad()
        peer.step()
    assert all(total.equal(gradient) for total, gradient in zip(expected, found, strict=True))
    assert all(parameter.grad is None for parameter in peer.model.parameters())
    assert all(not total.any() for total in peer._sums)


def test_the_peer_removes_one_channel_at_a_time_at_last(base):
    pytest.importorskip("torch_pruning")
    peer = methods.Peer("GroupMagnitudeImportance", False, methods.Start(TINY, copy.deepcopy(base), 0.6, 0))
    before = methods._widths(peer.model)
    peer._remove(methods.ONE, set())
    lost = {name: before[name] - width for name, width in methods._widths(peer.model).items() if width != before[name]}
    assert set(lost.values()) == {1}
    peer._remove(methods.ONE, set(lost))
    assert not set(lost) & {name for name, width in methods._widths(peer.model).items() if width < before[name] - 1}


def test_the_peer_undoes_what_goes_too_far(base):
    """In so narrow a network the next channel often costs more than there is room for."""
    pytest.importorskip("torch_pruning")
    peer = methods.Peer("GroupMagnitudeImportance", False, methods.Start(TINY, copy.deepcopy(base), 0.3, 0))
    for percent in range(95, 30, -6):
        target = percent / 100 * peer._whole
        peer._shrink(target)
        assert 0.99 * target <= macs(peer.model, TINY.size) <= target


def test_the_peer_ends_where_nothing_fits(base, monkeypatch):
    pytest.importorskip("torch_pruning")
    peer = methods.Peer("GroupMagnitudeImportance", False, methods.Start(TINY, copy.deepcopy(base), 0.6, 0))
    monkeypatch.setattr(methods, "WITHIN", 1e-9)
    with pytest.raises(TaylorError, match=r"torch-pruning: no channel left that fits, at .*% of the MACs where 60.00%"):
        peer._shrink(0.6 * peer._whole + 0.5)
    monkeypatch.setattr(peer, "_remove", lambda share, passed_over: None)
    with pytest.raises(TaylorError, match="torch-pruning: no channel left that fits"):
        peer._shrink(0.5 * peer._whole)


def test_a_missing_peer_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "installed", lambda name: None)
    assert not any(name.startswith("torch") for name in command._methods(None))
    assert "torch-pruning:taylor left out: torch-pruning isn't installed" in capsys.readouterr().out


# -- the command -------------------------------------------------------------------------------------------------------


def test_two_methods_from_end_to_end_and_again(tiny, tmp_path, capsys):
    rows = tiny("--methods", *TWO)
    assert [row["provider"] for row in rows] == list(TWO)
    assert {"commit", "torch", "run_id", "threads", "device_name", "time"} < rows[0].keys()
    assert set(IDENTITY) <= rows[0].keys()
    folder = tmp_path / "results" / "cpu"
    assert "ours:magnitude" in (folder / "frontier.md").read_text()
    assert (folder / "frontier-tiny.png").read_bytes().startswith(b"\x89PNG")
    # nothing is run twice
    assert tiny("--methods", *TWO) == rows
    # what is missing is run, from the base network that lies there
    path = folder / "frontier.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    again = tiny("--methods", *TWO)
    assert again[0] == rows[0]
    assert [again[1][key] for key in ("base", "accuracy", "macs")] == [
        rows[1][key] for key in ("base", "accuracy", "macs")
    ]
    assert len(tiny("--methods", TWO[0], "--budgets", "0.6", "0.5")) == 3
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    assert len(tiny("--methods", *TWO)) == 3, "training is deterministic here, so the base network is the same"


def test_other_settings_and_other_bases_are_other_points(tiny, monkeypatch, tmp_path):
    rows = tiny("--methods", TWO[0])
    assert finished(rows, rows[0])
    for key, value in (("base", "other"), ("budget", 0.5), ("seed", 1), ("provider", TWO[1]), ("device_name", "other")):
        assert not finished(rows, rows[0] | {key: value})
    monkeypatch.setitem(FORMS, "tiny", replace(TINY, finetune_steps=1))
    assert len(tiny("--methods", TWO[0])) == 2


def test_a_failed_point_is_named_and_the_others_go_on(tiny, monkeypatch, capsys):
    class Failing(methods.Ours):
        def __init__(self, start):
            raise TaylorError("it can't")

    monkeypatch.setattr(command, "methods", lambda: {"ours:bad": Failing} | methods.methods())
    rows = tiny("--methods", "ours:bad", TWO[0], status=1)
    assert [row["provider"] for row in rows] == [TWO[0]]
    assert "FAILED: it can't" in capsys.readouterr().err


def test_the_time_limit_leaves_points_for_the_next_run(tiny, capsys):
    assert tiny("--methods", *TWO, "--time-limit", "1e-9") == []
    assert "2 points left out, the time limit is near" in capsys.readouterr().out
    assert len(tiny("--methods", *TWO)) == 2


def test_no_point_is_begun_that_would_probably_end_too_late(tiny, monkeypatch, capsys):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    # deadline at 45, the seed at 10, the first point from 20 to 30, the second one from 40, where there is time for 5
    assert len(tiny("--methods", *TWO, "--time-limit", "45")) == 1
    assert "1 points left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form", "huge"], "form: wanted one of small, full, got 'huge'"),
        (["--methods", "ours:nothing"], "methods: wanted some of ours:taylor_fo"),
        (["--budgets", "1.5"], "budgets: wanted shares of the MACs between 0 and 1, got 1.5"),
        (["--time-limit", "0"], "time_limit: wanted a number above 0, got 0.0"),
        (["--device", "nothing"], "device: 'nothing' can't be used here"),
        (["--table"], "results: wanted rows of"),
    ],
)
def test_what_can_not_be_used_is_said(arguments, message, tmp_path, capsys):
    assert command.main([*arguments, "--results", str(tmp_path), "--work", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_base_network_is_named(task, tmp_path):
    point.base_network(task, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"no")
    with pytest.raises(InputError, match=r"work: .*base-.*\.pt is damaged; delete it"):
        point.base_network(task, 0, tmp_path)


def test_another_seed_has_another_base_network(task, tmp_path):
    digests = {point.base_network(task, seed, tmp_path)[1] for seed in (0, 1)}
    assert len(digests) == 2
    assert point.base_network(task, 0, tmp_path)[1] in digests


def test_making_a_base_network_leaves_the_global_generator_alone(task, tmp_path):
    state = torch.get_rng_state()
    point.base_network(task, 5, tmp_path)
    assert state.equal(torch.get_rng_state())


# -- table and figure --------------------------------------------------------------------------------------------------


def test_curves_are_means_over_the_same_seeds():
    rows = [
        make_row("ours:taylor_fo", b, s, a)
        for b, s, a in ((0.5, 0, 0.6), (0.5, 1, 0.8), (0.75, 0, 0.8), (0.75, 1, 0.9))
    ]
    found = curves(rows, "accuracy")["ours:taylor_fo"]
    assert list(found) == [0.75, 0.5]
    assert found[0.5].values == (0.6, 0.8)
    assert found[0.5].mean == pytest.approx(0.7)
    assert found[0.5].percent() == "70.0% (60.0…80.0)"
    assert curves(rows[1:], "accuracy")["ours:taylor_fo"].keys() == {0.75}


def test_only_comparable_rows_are_shown():
    name = environment("cpu")["device_name"]
    old = make_row(TWO[0], 0.5, 0, 0.1, time="2026-01-01")
    other_base = make_row(TWO[1], 0.35, 0, 0.2, time="2026-01-01", base="lost")
    other_settings = make_row(TWO[1], 0.75, 0, 0.3, time="2026-01-01", settings={})
    new = make_row(TWO[0], 0.5, 0, 0.4, time="2026-01-02")
    both = make_row(TWO[1], 0.5, 0, 0.5, time="2026-01-02")
    unfinished = make_row(TWO[0], 0.5, 1, 0.6, time="2026-01-03")
    rows = [old, other_base, other_settings, new, both, unfinished]
    assert newest(rows, "tiny", name) == [new, both]
    assert newest(rows, "tiny", "another machine") == []
    assert newest(rows, "small", name) == []


def test_the_table_says_what_the_rows_say():
    rows = [make_row(p, b, s, a + 0.1 * s) for p, b, a in ((TWO[0], 0.5, 0.6), (TWO[1], 0.5, 0.4)) for s in (0, 1)]
    rows[0]["macs"] = 0.496
    text = markdown(rows, [*reversed(TWO), "torch-pruning:taylor"])
    assert "| accuracy | 50% of the MACs |" in text
    assert "| ours:taylor_fo | **65.0% (60.0…70.0)** |" in text
    assert "| ours:magnitude | 45.0% (40.0…50.0) |" in text
    assert "| ours:taylor_fo | **32.5% (30.0…35.0)** |" in text
    assert "| ours:magnitude | 1.00 | 4.00 |" in text
    assert text.index("ours:magnitude") < text.index("ours:taylor_fo")
    assert "to within 0.8%" in text
    assert "torch-pruning" not in text
    assert "6 classes" in text
    assert "Base network: 90.0%" in text


def test_labels_do_not_overlap():
    assert spaced([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert spaced([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    found = spaced([0.30, 0.31, 0.29, 0.9, 0.36], 0.05)
    order = sorted(range(5), key=[0.30, 0.31, 0.29, 0.9, 0.36].__getitem__)
    placed = [found[place] for place in order]
    assert all(b - a >= 0.05 - 1e-12 for a, b in itertools.pairwise(placed))
    assert found[3] == 0.9


def test_every_method_has_a_style_of_its_own():
    assert set(STYLES) == set(methods.methods())
    assert len({style[0] for style in STYLES.values()}) == len(STYLES)


def test_there_is_nothing_to_draw(tmp_path):
    # each point is missing one seed
    rows = [make_row(TWO[0], 0.5, 0), make_row(TWO[0], 0.75, 1)]
    with pytest.raises(InputError, match="plot: there is no point that every seed has"):
        write_figure(rows, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
    append([{**rows[0], "device": "cpu"}], tmp_path)
    assert len(read_rows(tmp_path)) == 1
