"""``taylor-cuda prune --recipe``: what wins over what, what --show and --recipes print, a flag for every setting."""

import dataclasses

import pytest

from taylor_cuda.cli import prune
from taylor_cuda.cli.main import main, parser
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.recipes import load, names

HEADLINE = "resnet101-75"
# For every setting a value that is not its default, as the command line has it.
FLAGS = {
    "model": ("timm:resnet18", "timm:resnet18"),
    "data": ("somewhere", "somewhere"),
    "out": ("runs/x", prune.Path("runs/x")),
    "weights": ("w.pt", "w.pt"),
    "num_classes": ("7", 7),
    "budget": ("params=0.3", {"params": 0.3}),
    "criterion": ("magnitude", "magnitude"),
    "schedule": ("linear", "linear"),
    "mode": ("mask", "mask"),
    "every": ("3", 3),
    "steps": ("4", 4),
    "ignore": ("stem.*", ("stem.*",)),
    "round_to": ("auto", "auto"),
    "min_keep": ("2", 2),
    "momentum": ("0.5", 0.5),
    "shared_norm": ("blocks", "blocks"),
    "epochs": ("5", 5),
    "finetune_epochs": ("6", 6),
    "total_epochs": ("7", 7),
    "batch": ("8", 8),
    "global_batch": ("16", 16),
    "optimizer": ("adamw", "adamw"),
    "lr": ("0.2", 0.2),
    "finetune_lr": ("0.1", 0.1),
    "lr_per": ("256", 256),
    "lr_schedule": ("step", "step"),
    "lr_step_epochs": ("3", 3),
    "lr_step_factor": ("0.5", 0.5),
    "warmup_epochs": ("1.5", 1.5),
    "weight_decay": ("0.1", 0.1),
    "label_smoothing": ("0.1", 0.1),
    "mixup": ("0.2", 0.2),
    "cutmix": ("1", 1.0),
    "distill": ("0.5", 0.5),
    "distill_temperature": ("2", 2.0),
    "ema": ("0.99", 0.99),
    "clip": ("1", 1.0),
    "group_lasso": ("1e-8", 1e-8),
    "reset_optimizer": (None, True),
    "amp": ("bf16", "bf16"),
    "channels_last": (None, True),
    "compile": (None, True),
    "sync_batch_norm": (None, True),
    "recalibrate": ("3", 3),
    "eval_every": ("2", 2),
    "checkpoint_every": ("100", 100),
    "checkpoints": ("5", 5),
    "tensorboard": (None, True),
    "device": ("cpu", "cpu"),
    "seed": ("9", 9),
    "image_size": ("32", 32),
    "workers": ("0", 0),
    "steps_limit": ("2", 2),
    "measure_seconds": ("0.1", 0.1),
    "oracle": ("1", 1),
}


def config(*arguments):
    return prune.config_from(parser().parse_args(["prune", *arguments]))


def given(name, text):
    if name == "model":
        return (text,)
    flag = "--" + name.replace("_", "-")
    return (flag,) if text is None else (flag, text)


def shown(capsys, *arguments):
    """``{setting: (value, origin)}`` and the lines above."""
    assert main(["prune", *arguments, "--show"]) == 0
    above, _, below = capsys.readouterr().out.rpartition("\n\n")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in below.splitlines()}
    return {name: (value, origin.strip()) for name, (value, origin) in rows.items()}, above


def test_every_setting_has_a_flag():
    assert list(FLAGS) == [setting.name for setting in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name):
    text, value = FLAGS[name]
    found = getattr(config(*given(name, text)), name)
    assert found == value
    assert type(found) is type(value)
    assert found != getattr(config(), name)


@pytest.mark.parametrize("name", [name for name, (text, _) in FLAGS.items() if text is None])
def test_switches_of_a_recipe_can_be_turned_off(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(f"[settings]\n{name} = true", encoding="utf-8")
    assert getattr(config("--recipe", str(path)), name) is True
    assert getattr(config("--recipe", str(path), "--no-" + name.replace("_", "-")), name) is False


@pytest.mark.parametrize(
    "name",
    ["weights", "batch", "global_batch", "lr_per", "clip", "total_epochs", "finetune_lr", "checkpoint_every"],
)
def test_numbers_of_a_recipe_can_be_put_aside(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(f"[settings]\n{name} = {'4' if name != 'weights' else repr('pretrained')}", encoding="utf-8")
    assert getattr(config("--recipe", str(path)), name) is not None
    assert getattr(config("--recipe", str(path), *given(name, "none")), name) is None


def test_bad_numbers_are_named(capsys):
    assert main(["prune", "--clip", "much"]) == 2
    assert "argument --clip: invalid float value: 'much'" in capsys.readouterr().err


def test_a_recipe_is_under_the_command_line_and_over_the_defaults():
    found, recipe = config("--recipe", HEADLINE), load(HEADLINE)
    for key, value in recipe.settings.items():
        assert getattr(found, key) == value, key
    assert found.out == prune.Path("runs") / HEADLINE
    changed = config("timm:resnet50", "--recipe", HEADLINE, "--weights", "none", "--budget", "macs=0.5", "--lr", "1")
    assert (changed.model, changed.weights, changed.budget, changed.lr) == ("timm:resnet50", None, {"macs": 0.5}, 1.0)
    assert changed.finetune_lr == 0.001
    assert config("--recipe", HEADLINE, "--finetune-epochs", "3").total_epochs is None


def test_a_trial_run_of_a_recipe_is_short():
    found = config("--recipe", HEADLINE, "--steps-limit", "2")
    assert (found.steps, found.every, found.total_epochs, found.steps_limit) == (2, 1, 2, 2)
    assert config("--recipe", HEADLINE, "--steps-limit", "2", "--every", "5").every == 5
    assert config("--steps-limit", "2").every == 10


@pytest.mark.parametrize("name", names())
def test_show_prints_every_setting_and_runs_nothing(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipe = load(name)
    rows, above = shown(capsys, "--recipe", name)
    assert list(rows) == [setting.name for setting in dataclasses.fields(RunConfig)]
    assert {key for key, (_, origin) in rows.items() if origin == "recipe"} == set(recipe.settings)
    assert {key for key, (_, origin) in rows.items() if origin == "default"} == set(rows) - set(recipe.settings)
    assert rows["model"] == (recipe.settings["model"], "recipe")
    assert "status     not run here" in above
    assert f"source     {recipe.source}" in above
    if recipe.published is None:
        assert "published  no figures" in above
    else:
        figures = recipe.published
        assert f"{figures.gflops:.2f} of {figures.unpruned.gflops:.2f} GFLOPs" in above
        assert f"top-1 error {figures.top1_error:.2f} (unpruned {figures.unpruned.top1_error:.2f}) %" in above
    assert list(tmp_path.iterdir()) == []


def test_headline(capsys):
    rows, above = shown(capsys, "--recipe", HEADLINE, "--weights", "none", "--steps-limit", "2", "--no-compile")
    assert "4.70 of 7.80 GFLOPs, 3.12e7 of 4.45e7 parameters" in above
    assert "the abstract's claim" in above
    assert rows["budget"] == ("channels=0.751219", "recipe")
    assert rows["ignore"] == ("conv1", "recipe")
    assert rows["reset_optimizer"] == ("yes", "recipe")
    assert rows["weights"] == ("none", "command line")
    assert rows["compile"] == ("no", "command line")
    assert (rows["steps"], rows["every"]) == (("2", "trial run"), ("1", "trial run"))
    assert rows["epochs"] == ("0", "recipe")
    assert rows["clip"] == ("none", "default")


def test_show_without_a_recipe(capsys):
    assert main(["prune", "--lr", "0.1", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "digits", "default"]
    assert [line.split()[1:] for line in lines if line.startswith("lr ")] == [["0.1", "command", "line"]]


def test_list(capsys):
    assert main(["prune", "--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == names()
    (headline,) = [line for line in lines if line.startswith(HEADLINE)]
    for words in ("4.70 of 7.80", "3.12e7 of 4.45e7", "22.65 (unpruned 22.63)", "not run here"):
        assert words in headline


def test_a_recipe_that_is_not_there(capsys):
    assert main(["prune", "--recipe", "resnet50-80"]) == 2
    assert "no recipe named 'resnet50-80'" in capsys.readouterr().err
    assert main(["prune", "--recipe", HEADLINE]) == 2
    assert "data: no folder imagenet" in capsys.readouterr().err
