"""``taylor-cuda prune`` in this process, at tiny size: files, reports, stopping and going on."""

import json
import math
import os
import re
import signal

import pytest
import torch
import torchvision

from taylor_cuda.cli.main import main
from taylor_cuda.errors import InputError
from taylor_cuda.surgery import load, save
from taylor_cuda.train import pruning
from taylor_cuda.train.data import TensorData, load_data
from taylor_cuda.train.loop import evaluate
from taylor_cuda.train.models import DigitsResNet
from tests.train.image_folders import make_image_folder

SHORT = ("--epochs", "1", "--steps-limit", "4", "--every", "2", "--steps", "3", "--measure-seconds", "0.05")
TINY = (*SHORT, "--oracle", "0")
FILES = ["log.jsonl", "model.safetensors", "summary.json", "widths.svg"]


def prune(*arguments):
    return main(["prune", *map(str, arguments)])


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A tiny run from beginning to end: its folder."""
    out = tmp_path_factory.mktemp("straight") / "new" / "folder"
    assert prune(*SHORT, "--oracle", "1", "--out", out) == 0
    return out


def test_files_and_summary(straight):
    assert names(straight) == FILES
    found = summary_of(straight)
    assert found["macs_after"] <= 0.5 * found["macs_before"]
    assert found["params_after"] < found["params_before"]
    assert found["macs_before"] == 4475520  # see tests/cli/test_doctor.py
    assert found["cuts"] == 3
    assert found["cut_difference"] <= 1e-5 * found["cut_scale"]
    assert found["cut_scale"] > 0
    assert 0 < found["source_difference"] <= 1e-4
    assert all(found[f"latency_ms{batch}_{when}"] > 0 for batch in ("", "_batch1") for when in ("before", "after"))
    assert (found["criterion"], found["budget"], found["seed"]) == ("taylor_fo", {"macs": 0.5}, 0)
    assert found["oracle_examples"] == 62
    assert -1 <= found["magnitude_spearman"] < found["estimate_spearman"] <= 1
    assert found["oracle_note"] is None
    assert all(after % 8 == 0 for name, (_, after) in found["widths"].items() if name != "head")


def test_saved_model_is_the_pruned_one(straight):
    model = load(DigitsResNet(), straight / "model.safetensors")
    found = summary_of(straight)
    assert sum(value.numel() for value in model.parameters()) == found["params_after"]
    assert model.stage2[1].conv1.out_channels == found["widths"]["stage2.1.conv1"][1]
    limited = list(load_data("digits", 64).val())[:4]
    assert evaluate(model, limited, torch.device("cpu")).accuracy == found["pruned_accuracy"]


def test_log_is_json_lines_in_order(straight):
    records = [json.loads(line) for line in (straight / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [record["event"] for record in records]
    assert events == [
        "start",
        "epoch",
        "base",
        "prune",
        "prune",
        "epoch",
        "prune",
        "epoch",
        "pruned",
        "epoch",
        "finetuned",
    ]
    macs = [record["macs"] for record in records if record["event"] == "prune"]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] == summary_of(straight)["macs_after"]
    # Half a cosine from 0.05 over 4 steps, then a fifth of it while pruning, then half a cosine from there.
    last = 0.5 * (1 + math.cos(0.75 * math.pi))
    rates = [record["lr"] for record in records if record["event"] == "epoch"]
    assert rates == pytest.approx([0.05 * last, 0.01, 0.01, 0.01 * last])


def test_what_is_printed(capsys, tmp_path, straight):
    assert prune(*TINY, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line]
    assert re.fullmatch(r"cut == masked: greatest difference \S+ \(outputs up to \S+, 3 cuts\)", lines[-6])
    assert re.fullmatch(r"scores from parameters vs from activations: greatest relative difference \S+", lines[-5])
    assert re.fullmatch(r"scoring cost: -?\d+\.\d % of a step \(\d+\.\d ms\)", lines[-4])
    assert re.fullmatch(r"training step after pruning, mode cut: \d+\.\d ms", lines[-3])
    assert lines[-2] == "estimate vs oracle: not compared: --oracle N compares them on N minibatches"
    for words in ("MACs per example", "latency, batch 256", "stage2.1.conv1", "base: 1 epochs: accuracy"):
        assert words in out
    # The same seed gives the same network, asking the oracle or not.
    again, first = (load(DigitsResNet(), folder / "model.safetensors").state_dict() for folder in (tmp_path, straight))
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def interrupt_at(monkeypatch, batch, how):
    """Let the run's ``batch``-th training batch bring a Ctrl-C: raised where it is made, or as a signal."""
    original, seen = TensorData.train, []

    def train(self, epoch, start=0):
        for item in original(self, epoch, start):
            seen.append(1)
            if len(seen) == batch:
                if how == "raised":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(TensorData, "train", train)


def check_same_result(out, straight):
    """Figures and every weight, bit for bit."""
    resumed, expected = summary_of(out), summary_of(straight)
    for key in ("widths", "base_accuracy", "cut_accuracy", "pruned_accuracy", "cuts"):
        assert resumed[key] == expected[key]
    values = [load(DigitsResNet(), folder / "model.safetensors").state_dict() for folder in (out, straight)]
    assert all(torch.equal(value, values[1][name]) for name, value in values[0].items())


@pytest.mark.parametrize(
    ("batch", "how", "stage"),
    # 4 batches of base training, 4 for its evaluation, 1 to time a step with, 6 for pruning, 4 for its evaluation,
    # 1 to time, 4 at the end.
    [
        (2, "raised", "base"),
        (7, "signal", "base"),
        (9, "signal", "prune"),
        (10, "raised", "prune"),
        (14, "signal", "prune"),
        (23, "signal", "finetune"),
    ],
)
def test_ctrl_c_saves_and_resume_ends_the_same(monkeypatch, capsys, tmp_path, straight, batch, how, stage):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch, how)
        assert prune(*TINY, "--out", tmp_path) == 130
    err = capsys.readouterr().err
    assert f"interrupted in stage '{stage}'; state saved in {tmp_path / 'checkpoints'}" in err
    assert f"taylor-cuda prune {' '.join(TINY)} --out {tmp_path} --resume" in err
    assert "Traceback" not in err
    assert names(tmp_path) == ["checkpoints", "log.jsonl"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert prune(*TINY, "--out", tmp_path, "--resume") == 0
    assert names(tmp_path) == FILES
    check_same_result(tmp_path, straight)


@pytest.mark.parametrize(("mode", "batch"), [("compact", None), ("mask", None), ("compact", 13), ("compact", 23)])
def test_modes_end_in_the_same_network(monkeypatch, capsys, tmp_path, straight, mode, batch):
    arguments = (*TINY, "--mode", mode, "--out", tmp_path)
    if batch is not None:
        with monkeypatch.context() as patch:
            interrupt_at(patch, batch, "signal")
            assert prune(*arguments) == 130
        arguments = (*arguments, "--resume")
    assert prune(*arguments) == 0
    found, expected = summary_of(tmp_path), summary_of(straight)
    assert found["config"]["mode"] == mode
    for key in ("widths", "macs_after", "params_after", "channels_after", "cuts", "base_accuracy"):
        assert found[key] == expected[key], key
    for key in ("cut_accuracy", "pruned_accuracy"):
        assert abs(found[key] - expected[key]) <= 0.005, key
    assert found["pruned_step_ms"] > 0
    assert expected["pruned_step_ms"] > 0
    values = [load(DigitsResNet(), folder / "model.safetensors").state_dict() for folder in (tmp_path, straight)]
    assert all(value.shape == values[1][name].shape for name, value in values[0].items())
    assert f"mode {mode}" in capsys.readouterr().out


def test_ctrl_c_while_reports_are_written(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("taylor_cuda.cli.prune.write_widths_svg", interrupted)
        assert prune(*TINY, "--out", tmp_path) == 130
    assert "summary.json" not in names(tmp_path)
    assert prune(*TINY, "--out", tmp_path, "--resume") == 0
    assert names(tmp_path) == FILES
    capsys.readouterr()


def test_resume_of_another_run_is_refused(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, "raised")
        assert prune(*TINY, "--out", tmp_path) == 130
    capsys.readouterr()
    assert prune(*TINY, "--out", tmp_path, "--resume", "--budget", "macs=0.6") == 2
    assert "other settings: budget was {'macs': 0.5}, is {'macs': 0.6}" in capsys.readouterr().err
    assert prune(*TINY, "--out", tmp_path) == 2
    assert "holds checkpoints of a run that has not ended; go on with --resume" in capsys.readouterr().err
    (only,) = (tmp_path / "checkpoints").iterdir()
    only.write_bytes(only.read_bytes()[: only.stat().st_size // 2])
    with pytest.warns(UserWarning, match="is damaged"):
        assert prune(*TINY, "--out", tmp_path, "--resume") == 2
    assert f"there is nothing to go on from in {tmp_path}" in capsys.readouterr().err


def test_a_damaged_checkpoint_costs_no_more_than_the_time_since_the_one_before(monkeypatch, tmp_path, straight):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 14, "signal")
        assert prune(*TINY, "--checkpoint-every", "2", "--checkpoints", "2", "--out", tmp_path) == 130
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [int(path.name[:8]) for path in files] == [8, 9]
    files[1].write_bytes(b"half")
    with pytest.warns(UserWarning, match="is damaged .*trying the one before"):
        assert prune(*TINY, "--out", tmp_path, "--resume", "auto") == 0
    check_same_result(tmp_path, straight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    then = [json.loads(line)["step"] for line in (straight / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == then  # what was lost stands in the log once


def test_auto_begins_where_there_is_nothing_to_go_on_from(tmp_path, straight):
    assert prune(*TINY, "--out", tmp_path, "--resume", "auto") == 0
    check_same_result(tmp_path, straight)


def test_image_folder_with_a_zoo_model(monkeypatch, tmp_path):
    """The saved file fits a fresh ``resnet18()`` with its 1000 outputs, and computes what the pruned model computed."""
    data, out = make_image_folder(tmp_path / "data", train=8, val=4, size=72), tmp_path / "out"
    x, outputs = torch.randn(2, 3, 64, 64), []

    def save_and_remember(model, path, metadata):
        with torch.no_grad():
            outputs.append(model.eval()(x))
        save(model, path, metadata)

    monkeypatch.setattr(pruning, "save", save_and_remember)
    code = prune(
        "torchvision:resnet18", "--data", data, "--budget", "macs=0.5", "--epochs", "1", "--image-size", "64",
        "--batch", "8", "--every", "2", "--steps", "2", "--workers", "1", "--measure-seconds", "0.01", "--out", out,
    )  # fmt: skip
    assert code == 0
    model = load(torchvision.models.resnet18(), out / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(model(x), outputs[0])
    assert outputs[0].shape == (2, 1000)
    found = summary_of(out)
    assert found["macs_after"] <= 0.5 * found["macs_before"]
    assert found["cut_difference"] <= 1e-4 * found["cut_scale"]
    assert 0 < found["source_difference"] <= 1e-4
    assert found["oracle_examples"] == 0  # of a network that may be large, only when asked for


def test_ctrl_c_while_the_oracle_is_asked(monkeypatch, capsys, tmp_path, straight):
    arguments = (*SHORT, "--oracle", "1", "--out", tmp_path)
    original = TensorData.unaugmented

    def unaugmented(self):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(TensorData, "unaugmented", unaugmented)
        assert prune(*arguments) == 130
    assert "interrupted in stage 'oracle'" in capsys.readouterr().err
    assert prune(*arguments, "--resume") == 0
    resumed, expected = summary_of(tmp_path), summary_of(straight)
    for key in ("estimate_spearman", "magnitude_spearman", "widths", "pruned_accuracy"):
        assert resumed[key] == expected[key]
    spearman = f"estimate vs oracle: Spearman {resumed['estimate_spearman']:.2f} (magnitude "
    assert spearman in capsys.readouterr().out


def test_weights_skip_base_training(monkeypatch, capsys, tmp_path, straight):
    weights, recalibrated = straight / "model.safetensors", []
    original = pruning.recalibrate_batch_norm
    monkeypatch.setattr(
        pruning, "recalibrate_batch_norm", lambda *arguments: recalibrated.append(1) or original(*arguments)
    )
    code = prune(*TINY, "--weights", weights, "--budget", "params=0.7", "--criterion", "magnitude", "--out", tmp_path)
    assert code == 0
    found = summary_of(tmp_path)
    assert found["params_before"] == summary_of(straight)["params_after"]
    assert found["params_after"] <= 0.7 * found["params_before"]
    assert found["base_accuracy"] == summary_of(straight)["pruned_accuracy"]
    assert len(recalibrated) == 2  # after pruning and at the end: what somebody else trained is measured as it is
    model = load(DigitsResNet(), tmp_path / "model.safetensors")
    assert sum(value.numel() for value in model.parameters()) == found["params_after"]
    capsys.readouterr()


def test_a_corrupt_image_is_named_and_skipped(capsys, tmp_path):
    data = make_image_folder(tmp_path / "data", size=32)
    bad = data / "train" / "ant" / "2.jpg"
    bad.write_bytes(b"not a jpeg")
    small = ("--batch", "4", "--image-size", "32", "--workers", "0", "--every", "1", "--steps", "1", "--epochs", "1")
    out = tmp_path / "out"
    assert prune("timm:resnet10t", "--data", data, *small, "--measure-seconds", "0.01", "--out", out) == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [record for record in records if record["event"] == "unreadable"]
    assert [record["path"] for record in found] == [str(bad)]
    assert summary_of(out)["unreadable"] == 1
    assert "1 image file could not be read and was left out" in capsys.readouterr().out


def test_images_none_of_which_can_be_read_end_the_run_with_a_name(capsys, tmp_path):
    data = make_image_folder(tmp_path / "data", size=32)
    for bad in (data / "train").rglob("*.jpg"):
        bad.write_bytes(b"not a jpeg")
    small = ("--batch", "4", "--image-size", "32", "--workers", "0", "--every", "1", "--steps", "1")
    assert prune("timm:resnet10t", "--data", data, *small, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert f"not one image of a batch can be read, {data / 'train'}" in err
    assert "Traceback" not in err
    assert names(tmp_path / "out") == ["log.jsonl"]


def test_a_missing_picture_is_no_reason_to_fail(monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise InputError("widths.svg: the picture needs matplotlib")

    monkeypatch.setattr("taylor_cuda.cli.prune.write_widths_svg", missing)
    assert prune(*TINY, "--out", tmp_path) == 0
    assert "no picture: widths.svg: the picture needs matplotlib" in capsys.readouterr().out
    assert names(tmp_path) == [name for name in FILES if name != "widths.svg"]


def test_a_model_that_diverges_is_an_error(capsys, tmp_path):
    assert prune(*TINY, "--lr", "1e30", "--out", tmp_path) == 2
    assert "try a smaller --lr" in capsys.readouterr().err
    assert names(tmp_path) == ["log.jsonl"]
