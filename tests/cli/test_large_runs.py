"""What runs on many GPUs are made of, in one process at tiny size: accumulation, AMP, averages, distillation."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from taylor_cuda.surgery import load
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.data import load_data
from taylor_cuda.train.loop import evaluate
from taylor_cuda.train.models import DigitsResNet
from taylor_cuda.train.pruning import Stages
from taylor_cuda.train.session import Session
from tests.cli.test_prune import FILES, interrupt_at, names, prune, summary_of

TINY = (
    *("--epochs", "1", "--steps-limit", "4", "--every", "2", "--steps", "3", "--measure-seconds", "0.02"),
    *("--oracle", "0"),
)
EVERYTHING = (
    *("--global-batch", "64", "--batch", "16", "--amp", "bf16", "--channels-last", "--ema", "0.9", "--clip", "1"),
    *("--distill", "0.5", "--distill-temperature", "2", "--label-smoothing", "0.1", "--mixup", "0.2", "--cutmix", "1"),
    *("--optimizer", "adamw", "--lr", "0.002", "--lr-per", "32", "--warmup-epochs", "0.5", "--eval-every", "1"),
    *("--group-lasso", "1e-5", "--checkpoint-every", "3"),
)


def records_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def state_of(folder):
    return load(DigitsResNet(), folder / "model.safetensors").state_dict()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    assert prune(*TINY, *EVERYTHING, "--out", out) == 0
    return out


def test_everything_at_once(everything):
    assert names(everything) == FILES
    found = summary_of(everything)
    assert found["macs_after"] <= 0.5 * found["macs_before"]
    assert found["cut_difference"] <= 1e-5 * found["cut_scale"]
    assert "under AMP" in found["source_note"]
    start, *records = records_of(everything)
    assert (start["global_batch"], start["ranks"]) == (64, 1)
    rates = [record["lr"] for record in records if record["event"] == "epoch"]
    # peak 0.002 · 64 / 32; two of four steps of warm-up, then half a cosine over the other two
    assert rates[0] == pytest.approx(0.004 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[1] == pytest.approx(0.004 / 5)
    assert [record["step"] for record in records if record["event"] == "epoch"] == [4, 8, 10, 14]
    assert all(record["images_per_s"] > 0 and 0 <= record["data_wait"] <= 1 for record in records if "lr" in record)


def test_what_is_saved_is_the_average_that_was_evaluated(everything):
    model = load(DigitsResNet(), everything / "model.safetensors").to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(model, list(load_data("digits", 64).val())[:4], torch.device("cpu"))
    last = [record for record in records_of(everything) if record["event"] == "finetuned"][-1]
    assert found.loss == pytest.approx(last["loss"], rel=1e-6)


def test_the_network_takes_over_the_average_of_its_weights(tmp_path):
    session = Session(RunConfig(ema=0.9, out=tmp_path, device="cpu"))
    session.prepare_pruning()
    step = session.new_step()
    for images, labels in itertools.islice(session.train_batches(), 3):
        step(images, labels)
    assert session.evaluated is session.average.module
    average = {name: value.clone() for name, value in session.evaluated.state_dict().items()}
    assert not torch.equal(session.model.head.weight, average["head.weight"])
    session.take_the_average()
    assert session.evaluated is session.model
    assert all(torch.equal(value, average[name]) for name, value in session.model.state_dict().items())


@pytest.mark.parametrize("batch", [7, 38, 55, 68])
def test_going_on_with_everything_gives_the_same_bits(monkeypatch, tmp_path, everything, batch):
    """Scaler, average, teacher, random numbers of mixing: nothing of them is lost."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch, "signal")
        assert prune(*TINY, *EVERYTHING, "--out", tmp_path) == 130
    assert prune(*TINY, *EVERYTHING, "--out", tmp_path, "--resume") == 0
    values, expected = state_of(tmp_path), state_of(everything)
    assert all(torch.equal(value, expected[name]) for name, value in values.items())
    for key in ("base_accuracy", "cut_accuracy", "pruned_accuracy", "widths"):
        assert summary_of(tmp_path)[key] == summary_of(everything)[key]


def test_a_minibatch_in_parts_prunes_like_the_whole(tmp_path):
    """BatchNorm sees other statistics in parts of a batch, so only what doesn't depend on them is compared."""
    assert prune(*TINY, "--global-batch", "64", "--batch", "16", "--out", tmp_path) == 0
    found = summary_of(tmp_path)
    assert found["config"]["epochs"] == 1
    assert [record["step"] for record in records_of(tmp_path) if record["event"] == "prune"] == [6, 8, 10]


def test_pruning_within_one_schedule_ends_its_epoch_in_fine_tuning(tmp_path):
    small = ("--epochs", "0", "--total-epochs", "4", "--lr-schedule", "step", "--lr-step-epochs", "2", "--lr", "0.01")
    assert prune(*TINY, *small, "--finetune-lr", "0.01", "--reset-optimizer", "--out", tmp_path) == 0
    epochs = [record for record in records_of(tmp_path) if record["event"] == "epoch"]
    assert [(record["stage"], record["epoch"], record["step"]) for record in epochs] == [
        ("prune", 1, 4),
        ("prune", 2, 6),
        ("finetune", 2, 8),
        ("finetune", 3, 12),
        ("finetune", 4, 16),
    ]
    assert [record["lr"] for record in epochs] == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001])
    found = summary_of(tmp_path)
    assert found["macs_after"] <= 0.5 * found["macs_before"]


def test_momentum_is_forgotten_when_pruning_ends_if_that_is_asked_for(monkeypatch, tmp_path):
    states = []
    finetune = Stages._finetune

    def noted(stages):
        states.append(len(stages.session.optimizer.state))
        finetune(stages)

    monkeypatch.setattr(Stages, "_finetune", noted)
    for name, extra in (("kept", ()), ("forgotten", ("--reset-optimizer",))):
        assert prune(*TINY, *extra, "--out", tmp_path / name) == 0
    assert states[0] > 0
    assert states[1] == 0


def test_a_run_that_begins_with_pruning_warms_up_there(tmp_path):
    small = ("--epochs", "0", "--finetune-epochs", "1", "--lr", "0.01", "--finetune-lr", "0.01", "--lr-per", "32")
    assert prune(*TINY, *small, "--batch", "64", "--warmup-epochs", "2", "--steps-limit", "5", "--out", tmp_path) == 0
    epochs = [record for record in records_of(tmp_path) if record["event"] == "epoch"]
    assert [record["stage"] for record in epochs] == ["prune", "prune", "finetune"]
    # twice 0.01, reached after ten minibatches, of which pruning takes six; then half a cosine from all of it
    last = 0.5 * (1 + math.cos(0.8 * math.pi))
    assert [record["lr"] for record in epochs] == pytest.approx([0.02 * 5 / 10, 0.02 * 6 / 10, 0.02 * last])


def test_too_few_epochs_for_the_prune_steps_are_refused(capsys, tmp_path):
    assert prune(*TINY, "--total-epochs", "1", "--out", tmp_path) == 2
    assert "total_epochs: wanted enough for 3 prune steps every 2 of 4 minibatches an epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [("--amp", "fp16"), ("--compile", "--every", "200"), ("--compile",)],
    ids=["fp16", "compile", "compile between cuts"],
)
def test_low_precision_and_compiled_networks_end_at_the_same_widths(monkeypatch, tmp_path, arguments):
    """The compiler's front and graph, whose kernels are not what is tested here: they would take a minute to make."""
    in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: in_place(self, backend="aot_eager"))
    monkeypatch.setattr("taylor_cuda.train.pruning.COMPILE_FROM", 200 if len(arguments) == 1 else 0)
    found = {}
    options = (*TINY, "--steps-limit", "8")
    for name, extra in (("plain", ()), ("other", tuple(a for a in arguments if a not in ("--every", "200")))):
        assert prune(*options, "--round-to", "1", *extra, "--out", tmp_path / name) == 0
        found[name] = summary_of(tmp_path / name)
    widths = [found[name]["widths"] for name in ("plain", "other")]
    then, now = (sum(after for _, after in one.values()) for one in widths)
    assert abs(now - then) <= 0.02 * then
    assert found["other"]["macs_after"] == pytest.approx(found["plain"]["macs_after"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ema", "0.9", "--mode", "compact"), "ema: wanted mode='cut' with it"),
        (("--global-batch", "60", "--batch", "16"), "global_batch: wanted a multiple of 1 ranks of 16, got 60"),
        (("--optimizer", "adamv"), "optimizer: neither torch nor timm has one named 'adamv'"),
        (("--amp", "fp8"), "amp"),
        (("--total-epochs", "4", "--finetune-epochs", "2"), "total_epochs: wanted it or finetune_epochs, got both"),
        (("--distill", "1.5"), r"distill: wanted a number in [0, 1], got 1.5"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, tmp_path, arguments, message):
    assert prune(*TINY, *arguments, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []
