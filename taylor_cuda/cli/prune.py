"""``taylor-cuda prune``: train, prune to a budget while training, fine-tune, save, report."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from taylor_cuda.cli.options import (
    add_augmentation_options,
    add_large_run_options,
    add_model_options,
    add_rate_options,
    add_training_options,
    or_none,
    parse_round_to,
)
from taylor_cuda.cli.recipes import COMMAND_LINE, RECIPE, TRIAL, list_recipes, show
from taylor_cuda.errors import InputError
from taylor_cuda.importance.criteria import CRITERIA, find_criterion
from taylor_cuda.planning import parse_budget
from taylor_cuda.report import is_summary_of, measured_lines, run_table, write_summary, write_widths_svg
from taylor_cuda.surgery.modes import MODES
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.launch import rank_of_environment
from taylor_cuda.train.models import SPEC_FORMS
from taylor_cuda.train.pruning import run as run_pruning
from taylor_cuda.train.recipes import Recipe, load
from taylor_cuda.train.session import CHECKPOINTS
from taylor_cuda.train.summary import Summary

DESCRIPTION = f"""\
Train a network, remove channels while it trains until a budget is met, fine-tune, save, report.
Without arguments: a small residual network on scikit-learn's digits, to half its MACs.

MODEL is {SPEC_FORMS}.
The models of timm and torchvision keep the head they come with (1000 outputs) unless --num-classes is given, so that
tc.load(torchvision.models.resnet18(), file) fits; a data set with fewer classes uses the first of them.

--recipe NAME takes all settings from a recipe, MODEL and --weights included; what is given beside it has precedence.

Written to --out: model.safetensors (tc.load reads it), summary.json, log.jsonl, widths.svg.
Ctrl-C and SIGTERM save the state; the same command with --resume goes on. So it does after a crash, from the last of
the checkpoints that are written after each epoch. On several GPUs: torchrun --nproc-per-node 8 -m taylor_cuda prune …
"""

SUMMARY = "summary.json"
NO_SETTINGS = {"run", "command", "resume", "recipe", "recipes", "show"}


def add_parser(commands: Any) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "prune",
        help="prune a network to a budget",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=start)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="what to prune (default: digits)")
    recipes = parser.add_argument_group("recipes")
    recipes.add_argument("--recipe", metavar="NAME", help="settings of a whole run: a name, or a .toml file")
    recipes.add_argument("--recipes", action="store_true", help="list the recipes and their published figures, and end")
    recipes.add_argument("--show", action="store_true", help="print every setting and where it is from, and end")
    add_model_options(parser)
    add_pruning_options(parser)
    add_stage_options(parser)
    add_large_run_options(parser)
    add_running_options(parser)


def add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """What goes, how, and by which score."""
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--budget",
        action="append",
        metavar="NAME=X",
        help="macs, params or channels as a fraction of the original; several with commas (default: macs=0.5)",
    )
    pruning.add_argument("--criterion", metavar="NAME", help=f"one of {', '.join(CRITERIA)} (default: taylor_fo)")
    pruning.add_argument(
        "--every", type=int, metavar="N", help="minibatches between prune steps (default: 10 on digits, else 30)"
    )
    pruning.add_argument("--steps", type=int, metavar="N", help="prune steps until the budget is met (default: 10)")
    pruning.add_argument("--schedule", choices=("cubic", "linear"), help="path of the budget (default: cubic)")
    pruning.add_argument(
        "--mode",
        choices=MODES,
        help="how channels go: cut for real; compact: the network runs as small, all weights stay until the end; mask: "
        "they are off, at full cost (default: cut)",
    )
    pruning.add_argument(
        "--ignore", action="append", metavar="GLOB", help="modules whose outputs stay; may be repeated"
    )
    pruning.add_argument(
        "--round-to", metavar="N", help="widths that shrink are multiples of N (default: 8 on digits, else auto)"
    )
    pruning.add_argument("--min-keep", type=int, metavar="N", help="channels that every group keeps (default: 1)")
    pruning.add_argument("--momentum", type=float, metavar="X", help="of the scores' moving average (default: 0.9)")
    pruning.add_argument(
        "--shared-norm",
        choices=("none", "blocks"),
        help="blocks: divide the scores of channels that run through several blocks by the number of blocks, as the "
        "paper's code does (default: none)",
    )


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """How the network is trained before, while and after it is pruned."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="of base training (none with --weights), and of fine-tuning (default: 12 on digits, else 25)",
    )
    training.add_argument(
        "--finetune-epochs", type=or_none(int), metavar="N", help="of fine-tuning (default: --epochs)"
    )
    training.add_argument(
        "--finetune-lr",
        type=or_none(float),
        metavar="X",
        help="while pruning and fine-tuning (default: a fifth of --lr, with --weights --lr)",
    )
    add_training_options(training)
    add_rate_options(training)
    add_augmentation_options(training)


def add_running_options(parser: argparse.ArgumentParser) -> None:
    """Where it is written, and how much is measured."""
    running = parser.add_argument_group("running")
    running.add_argument("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/NAME)")
    running.add_argument(
        "--resume",
        nargs="?",
        const=True,
        choices=("auto",),
        help="go on from the newest whole checkpoint of this command; auto: if there is one, else begin, unless it has "
        "ended",
    )
    running.add_argument(
        "--steps-limit",
        type=or_none(int),
        metavar="N",
        help="at most N minibatches an epoch, for a trial run; with --recipe, pruning takes one epoch then and "
        "fine-tuning one more",
    )
    running.add_argument(
        "--measure-seconds", type=float, metavar="X", help="time for each measurement of time (default: 5)"
    )
    running.add_argument(
        "--oracle",
        type=int,
        metavar="N",
        help="compare the scores with the true effect of removing each channel, on N minibatches; takes forward passes "
        "for every channel (default: 6 on digits, else 0)",
    )


def config_from(options: argparse.Namespace) -> RunConfig:
    """The run that was asked for; what was left out gets its default.

    Raises:
        InputError: a value that can't be used.
    """
    return asked_for(options)[0]


def asked_for(options: argparse.Namespace) -> tuple[RunConfig, dict[str, str], Recipe | None]:
    """The run that was asked for, where its settings are from, and the recipe.

    Raises:
        InputError: a value that can't be used.
    """
    given = {key: value for key, value in vars(options).items() if key not in NO_SETTINGS}
    if "budget" in given:
        given["budget"] = parse_budget(",".join(given["budget"]))
    if "ignore" in given:
        given["ignore"] = tuple(given["ignore"])
    if "round_to" in given:
        given["round_to"] = parse_round_to(given["round_to"])
    origins = dict.fromkeys(given, COMMAND_LINE)
    recipe = load(options.recipe) if "recipe" in options else None
    if recipe is not None:
        added = recipe.under(given)
        for key, value in added.items():
            given[key] = value
            origins[key] = RECIPE if value == recipe.settings.get(key) else TRIAL
        given.setdefault("out", Path("runs") / recipe.name)
    model = given.setdefault("model", "digits")
    data = given.setdefault("data", "digits")
    find_criterion(given.setdefault("criterion", "taylor_fo"))
    given.setdefault("out", Path("runs") / short_name(model))
    if data != "digits":
        given.setdefault("epochs", 25)
        given.setdefault("every", 30)
        given.setdefault("round_to", "auto")
        given.setdefault("oracle", 0)
    if given.get("weights") is not None:
        given.setdefault("lr", 1e-3)
    return RunConfig(**given), origins, recipe


def short_name(model: str) -> str:
    """A folder's name for a model: what stands after its last colon."""
    return re.sub(r"[^\w.-]+", "-", model.rpartition(":")[2]).strip(".-") or "model"


def start(options: argparse.Namespace) -> int:
    """Print what was asked about, or prune."""
    if getattr(options, "recipes", False):
        print(list_recipes())
    elif getattr(options, "show", False):
        print(show(*asked_for(options)))
    else:
        return run(options)
    return 0


def run(options: argparse.Namespace) -> int:
    """Prune, then print what came of it."""
    config = config_from(options)

    def finish(summary: Summary) -> None:
        try:
            write_widths_svg(summary.widths, config.out / "widths.svg", picture_title(summary))
        except InputError as error:  # a picture is no reason to lose a run
            print(f"no picture: {error}")
        write_summary(summary, config.out / SUMMARY)

    resume = getattr(options, "resume", False)
    if resume == "auto" and not any_checkpoint(config) and is_summary_of(config.out / SUMMARY, config):
        if rank_of_environment()[0] == 0:
            print(f"this run has ended: its results are in {config.out}/ (to run it again, leave --resume out)")
        return 0
    summary = run_pruning(config, resume, tell=lambda line: print(line, flush=True), finish=finish, progress=True)
    if rank_of_environment()[0] > 0:
        return 0
    print()
    print(run_table(summary))
    print()
    print("\n".join(measured_lines(summary)))
    print(f"\nwritten to {config.out}/ in {summary.seconds:.0f} s")
    return 0


def any_checkpoint(config: RunConfig) -> bool:
    """There is something to go on from, whole or not."""
    return any((config.out / CHECKPOINTS).glob("*.pt"))


def picture_title(summary: Summary) -> str:
    """One line over the picture."""
    macs = summary.macs_after / summary.macs_before
    return (
        f"{summary.model}: {macs:.2f} of the MACs, accuracy {summary.base_accuracy:.4f} → {summary.pruned_accuracy:.4f}"
    )
