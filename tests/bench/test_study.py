"""What the study promises, its table and its picture, from numbers made up; its measuring is in tests/study."""

import copy
import json
import math

import pytest

from taylor_cuda.bench import study
from taylor_cuda.bench.study import EARLY, LENET, RESIDUAL, criteria_on, main, promises, spearman, write
from taylor_cuda.bench.study_report import markdown, means
from taylor_cuda.importance import CRITERIA

RHO = {"taylor_so": 0.98, "taylor_so_hessian": 0.985, "taylor_fo": 0.92, "magnitude": 0.5, "random": None}


def row(rho, shift=0.0):
    value = None if rho is None else rho + shift
    parts = {"pearson": 0.1, "spearman": value, "kendall": 0.3}
    return {"overall": parts, "layers": {**parts, "spearman": 0.4}, "seconds": 2.0, "relative": 4.0}


def made_up(**changes):
    """A study in which every promise is kept but for ``changes`` of all networks' correlations."""
    runs = {}
    for seed in (0, 1, 2):
        criteria = {name: row(changes.get(name, rho), 0.01 * (seed - 1)) for name, rho in RHO.items()}
        criteria["bn_scale"] = {"reason": "no scale"}
        runs[str(seed)] = {
            "base_accuracy": 0.99, "units": {"a": 4, "b": 6}, "examples": 100, "loss": 0.1, "accuracy": 1.0,
            "pass_seconds": 0.5, "oracle_seconds": 20.0, "criteria": criteria,
        }  # fmt: skip
    where = {
        "time": "2026-01-02T03:04:05",
        "device_name": "a processor",
        "threads": 1,
        "torch": "2",
        "commit": "c" * 40,
    }
    others = {network: copy.deepcopy(runs) for network in (LENET, EARLY)}
    return {
        "networks": {LENET: others[LENET], RESIDUAL: runs, EARLY: others[EARLY]},
        "environment": {**where, "dirty": False},
    }


def test_every_promise_is_kept_or_missed_alone():
    assert [good for _, good in promises(made_up())] == [True] * 10
    for changes, missed in (
        ({"taylor_fo": 0.905}, [0]),
        ({"taylor_so": 0.965, "taylor_so_hessian": 0.97}, [1]),
        ({"taylor_so": 0.958, "taylor_so_hessian": 0.96}, [1, 2]),
        ({"taylor_so_hessian": 0.996}, [3]),
        ({"taylor_so_hessian": 0.964}, [3]),
        ({"magnitude": 0.68}, [4]),
    ):
        kept = promises(made_up(**changes))
        both = [*missed, *(5 + index for index in missed)]  # early in training, and late
        assert [index for index, (_, good) in enumerate(kept) if not good] == both, changes
    for network, criterion, low, missed in ((RESIDUAL, "magnitude", 0.68, 9), (EARLY, "taylor_fo", 0.89, 0)):
        found = made_up()
        found["networks"][network]["1"]["criteria"][criterion]["overall"]["spearman"] = low  # of one seed alone
        assert [index for index, (_, good) in enumerate(promises(found)) if not good] == [missed]
    assert "0.910, 0.920, 0.930" in promises(made_up())[0][0]


def test_what_was_not_measured_is_not_kept():
    found = made_up()
    del found["networks"][RESIDUAL]["2"]
    names = "taylor_fo, taylor_so, taylor_so_hessian, magnitude"
    assert promises(found)[5:] == [(f"residual: not measured on 3 seeds: {names}", False)]
    assert spearman(found, RESIDUAL, "bn_scale") == []
    found = made_up()
    del found["networks"][EARLY]
    assert promises(found)[0] == (f"early: not measured on 3 seeds: {names}", False)


def test_means_over_seeds_best_first():
    entries = means(made_up(), RESIDUAL)
    assert [e["criterion"] for e in entries] == [
        "taylor_so_hessian", "taylor_so", "taylor_fo", "magnitude", "random", "bn_scale",
    ]  # fmt: skip
    assert entries[1]["overall"]["spearman"] == pytest.approx(0.98)
    assert entries[1]["spearman"] == pytest.approx([0.97, 0.98, 0.99])
    assert entries[1]["layers"]["spearman"] == pytest.approx(0.4)
    assert math.isnan(entries[4]["overall"]["spearman"])
    assert entries[5]["reason"] == "no scale"


def test_table_says_everything():
    found = made_up()
    text = markdown(found, promises(found))
    so = next(line for line in text.splitlines() if line.startswith("| taylor_so |"))
    assert so.strip("| ").split(" | ") == [
        "taylor_so", "0.100", "0.980", "0.300", "0.100", "0.400", "0.300", "0.970 / 0.980 / 0.990", "2.00", "4.00",
    ]  # fmt: skip
    assert "| bn_scale |  |  |  |  |  |  | no scale |  |  |" in text
    assert "10 units in 2 layers or coupled groups, 100 images, seeds 0, 1, 2. Loss on them: 0.1." in text
    assert "- kept: residual: taylor_so: ρ at least 0.95 on every seed: 0.970, 0.980, 0.990" in text
    assert "2026-01-02, a processor, 1 threads, torch 2, commit ccccccccc." in text
    assert "| random | 0.100 | – |" in text


def test_files(tmp_path, capsys):
    write(made_up(), tmp_path / "results")
    folder = tmp_path / "results"
    assert sorted(entry.name for entry in folder.iterdir()) == ["study.json", "study.md", "study.png"]
    assert json.loads((folder / "study.json").read_text(encoding="utf-8")) == made_up()
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


@pytest.mark.parametrize(("fo", "check", "code"), [(0.92, True, 0), (0.8, True, 1), (0.8, False, 0)])
def test_command(monkeypatch, capsys, tmp_path, fo, check, code):
    found, asked = made_up(taylor_fo=fo)["networks"], []

    def measure(network, seed, criteria):
        asked.append((network, seed, len(criteria)))
        return found[network][str(seed)]

    monkeypatch.setattr(study, "measure", measure)
    assert main(["--results", str(tmp_path), *(["--check"] if check else [])]) == code
    whole = len(CRITERIA)
    counts = {LENET: whole, RESIDUAL: whole - 1, EARLY: whole - 1}
    assert asked == [(network, seed, count) for network, count in counts.items() for seed in range(3)]
    out = capsys.readouterr().out
    assert ("missed  early: taylor_fo" in out) == (fo < 0.9)
    assert (tmp_path / "study.md").is_file()


def test_what_costs_most_is_left_out_unless_asked_for():
    for network in (RESIDUAL, EARLY):
        assert set(CRITERIA) - set(criteria_on(network, everything=False)) == {"obd"}
    assert criteria_on(RESIDUAL, everything=True) == criteria_on(LENET, everything=False) == list(CRITERIA)
