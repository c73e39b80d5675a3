"""``taylor-cuda compare`` in this process, at tiny size: files, what is printed, stopping and going on."""

import json
import os
import re
import signal
import sys

import pytest
import torch

from taylor_cuda.cli.compare import asked_for
from taylor_cuda.cli.main import main, parser
from taylor_cuda.errors import InputError
from taylor_cuda.study.evaluate import Evaluator
from taylor_cuda.surgery import save
from taylor_cuda.train import comparison
from taylor_cuda.train.data import TensorData
from taylor_cuda.train.models import DigitsResNet
from tests.train.image_folders import make_image_folder

TINY = ("--epochs", "1", "--steps-limit", "4", "--batches", "1", "--criteria", "taylor_fo,magnitude")
FILES = ["comparison.json", "log.jsonl", "removal.png", "scatter.png", "table.txt"]


def compare(*arguments):
    return main(["compare", *map(str, arguments)])


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def read(folder, name="comparison.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A tiny run from beginning to end: its folder."""
    out = tmp_path_factory.mktemp("straight") / "new" / "folder"
    assert compare(*TINY, "--out", out) == 0
    return out


def test_files_and_what_is_in_them(straight):
    assert names(straight) == FILES
    found = read(straight)
    assert [row["criterion"] for row in found["rows"]] == ["taylor_fo", "magnitude"]
    assert found["rows"][0]["agreement"]["overall"]["spearman"] > found["rows"][1]["agreement"]["overall"]["spearman"]
    assert list(found["rows"][0]["after"]) == ["macs=0.9", "macs=0.75", "macs=0.5"]
    assert found["examples"] == 62
    assert sum(len(change) for change in found["truth"].values()) == 288
    assert (found["model"], found["data"], found["seed"], found["base_epochs"]) == ("digits", "digits", 0, 1)
    assert 0 <= found["intact"]["metric"] <= 1
    assert found["environment"]["torch"] == torch.__version__
    for name in ("scatter.png", "removal.png"):
        assert (straight / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_printed(capsys, tmp_path, straight):
    weights = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save(DigitsResNet(), weights)
    out = tmp_path / "out"
    options = ("--batches", "1", "--criteria", "magnitude", "--budget", "channels=0.5,macs=0.7", "--sensitivity")
    assert compare("digits", "--weights", weights, *options, "magnitude", "--stop-above", "2.5", "--out", out) == 0
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text(encoding="utf-8") in printed
    assert (out / "sensitivity.txt").read_text(encoding="utf-8") in printed
    assert re.search(r"loss right after removal +channels=0\.5 +macs=0\.7\n", printed)
    assert printed.splitlines()[-1].startswith(f"written to {out}/ in ")
    more = ["sensitivity-cache.json", "sensitivity.json", "sensitivity.png", "sensitivity.txt"]
    assert names(out) == sorted([*FILES, *more])
    assert read(out)["base_epochs"] == 0
    narrowed = read(out, "sensitivity.json")
    assert len(narrowed["losses"]) == 6
    assert narrowed["fractions"][0] == 0.9
    table = (straight / "table.txt").read_text(encoding="utf-8")
    assert table.startswith("288 units in 6 groups, 62 examples in 1 batches")


@pytest.mark.parametrize("stage", ["base", "compare"])
def test_ctrl_c_saves_and_resume_ends_the_same(monkeypatch, capsys, tmp_path, straight, stage):
    handler = signal.getsignal(signal.SIGINT)
    original, seen = TensorData.train, []

    def train(self, epoch, start=0):
        for item in original(self, epoch, start):
            seen.append(1)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    def stopped(session, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return ask(session, *arguments)

    ask = comparison._ask
    with monkeypatch.context() as patch:
        if stage == "base":
            patch.setattr(TensorData, "train", train)
        else:
            patch.setattr(comparison, "_ask", stopped)
        assert compare(*TINY, "--out", tmp_path) == 130
    err = capsys.readouterr().err
    assert f"interrupted in stage '{stage}'; state saved in {tmp_path / 'checkpoints'}" in err
    assert f"taylor-cuda compare {' '.join(TINY)} --out {tmp_path} --resume" in err
    assert names(tmp_path) == ["checkpoints", "log.jsonl", *(["oracle.pt"] if stage == "compare" else [])]
    assert signal.getsignal(signal.SIGINT) is handler
    assert compare(*TINY, "--out", tmp_path, "--resume") == 0
    assert names(tmp_path) == FILES
    resumed, expected = read(tmp_path), read(straight)
    assert resumed["truth"] == expected["truth"]
    assert [row["scores"] for row in resumed["rows"]] == [row["scores"] for row in expected["rows"]]


class Interrupting:
    def __init__(self, *_):
        raise KeyboardInterrupt


def test_the_oracle_is_not_asked_twice(monkeypatch, capsys, tmp_path, straight):
    arguments = (*TINY, "--out", tmp_path)
    original, calls = Evaluator.losses, []

    def counted(*everything, **named):
        calls.append(1)
        return original(*everything, **named)

    monkeypatch.setattr(Evaluator, "losses", counted)
    with monkeypatch.context() as patch:
        module = sys.modules["taylor_cuda.study.compare"]  # the function of that name stands before it
        patch.setattr(module, "_Job", Interrupting)
        assert compare(*arguments) == 130
    assert names(tmp_path) == ["checkpoints", "log.jsonl", "oracle.pt"]
    assert len(calls) >= 6
    calls.clear()
    assert compare(*arguments, "--resume") == 0
    assert calls == []
    assert names(tmp_path) == FILES
    assert read(tmp_path)["truth"] == read(straight)["truth"]
    capsys.readouterr()


def test_image_folder_with_a_model_of_ones_own(tmp_path):
    data, out = make_image_folder(tmp_path / "data", train=8, val=4, size=40), tmp_path / "out"
    file = tmp_path / "nets.py"
    file.write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))\n",
        encoding="utf-8",
    )
    options = ("--epochs", "1", "--image-size", "32", "--batch", "4", "--workers", "0")
    criteria = ("--criteria", "taylor_fo,bn_scale")
    assert compare(f"{file}:tiny", "--data", data, *options, *criteria, "--out", out) == 0
    found = read(out)
    assert found["examples"] == 16  # four batches of four
    assert found["rows"][1]["criterion"] == "bn_scale"
    assert "no normalisation with a scale" in found["rows"][1]["reason"]


def test_a_missing_picture_is_no_reason_to_fail(monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise InputError("scatter.png: the picture needs matplotlib")

    monkeypatch.setattr("taylor_cuda.cli.compare.write_scatter_png", missing)
    assert compare(*TINY, "--out", tmp_path) == 0
    assert "no picture: scatter.png: the picture needs matplotlib" in capsys.readouterr().out
    assert names(tmp_path) == [name for name in FILES if name != "scatter.png"]


def asked(*arguments):
    return asked_for(parser().parse_args(["compare", *arguments]))


def test_defaults():
    config, question = asked()
    assert (config.model, config.data, config.epochs, str(config.out)) == ("digits", "digits", 12, "runs/compare")
    assert (question.criteria, question.batches, question.sensitivity) == (None, None, None)
    assert dict(question.budgets) == {"macs": (0.9, 0.75, 0.5)}
    config, question = asked("torchvision:resnet18", "--data", "somewhere", "--weights", "pretrained", "--sensitivity")
    assert (config.epochs, config.lr, config.base_epochs) == (25, 1e-3, 0)
    assert (question.criteria, question.batches, question.sensitivity) == (None, 4, "taylor_fo")
    assert asked("--budget", "macs=0.5", "--budget", "channels=0.5,macs=0.3")[1].budgets == {
        "macs": [0.5, 0.3],
        "channels": [0.5],
    }
    assert asked("--criteria", "all")[1].criteria == "all"
    assert asked("--criteria", "fisher, magnitude")[1].criteria == ["fisher", "magnitude"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--criteria", "taylor"), "criterion: wanted one of taylor_fo"),
        (("--criteria", ","), "criteria: wanted at least one name"),
        (("--sensitivity", "taylor"), "criterion: wanted one of taylor_fo"),
        (("--batches", "0"), "batches: wanted a number of at least 1, got 0"),
        (("--budget", "macs=2"), "budget: macs=2.0 isn't a fraction"),
        (("--budget", "speed=0.5"), "budget: unknown 'speed'"),
        (("--ignore", "no.such.module"), "no.such.module"),
        (("--weights", "none.safetensors"), "weights: no file none.safetensors"),
        (("--resume",), "there is nothing to go on from"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert compare(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []
