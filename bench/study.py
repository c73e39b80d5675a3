"""``python -m taylor_cuda.bench.study``: how well does every criterion agree with the truth, and what does it cost?

The structure of the correlation tables of Molchanov et al. (CVPR 2019), on scikit-learn's digits: two networks, a
LeNet-like one with BatchNorm and the residual one of ``taylor-cuda prune``, three seeds each, trained as that command
trains; and the residual one after two epochs of it, for first order lives on a loss that is still going down. The truth
is the squared change of the loss over the whole training set when one unit is removed, for every unit of every layer;
coupled channels are scored and removed together. Every criterion sees that set once, in eval mode. Correlations
(Pearson, Spearman, Kendall) are over the units of all layers together and, second, the mean over layers.
The cost is the seconds of that one pass, beside those of plain forward and backward passes in the same run.

Written: ``study.json``, ``study.md``, ``study.png``. ``--check`` fails where a promise is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.rows import RESULTS
from taylor_cuda.bench.study_report import markdown, write_picture
from taylor_cuda.errors import TaylorError
from taylor_cuda.files import replacing
from taylor_cuda.importance import CRITERIA
from taylor_cuda.study.comparison import Comparison, plain
from taylor_cuda.train.comparison import Question
from taylor_cuda.train.comparison import run as run_comparison
from taylor_cuda.train.config import RunConfig

RESIDUAL, LENET, EARLY = "residual", "lenet", "early"
NETWORKS: dict[str, dict[str, Any]] = {
    LENET: {"model": "taylor_cuda.bench.study:LeNet"},
    RESIDUAL: {"model": "digits"},
    EARLY: {"model": "digits", "epochs": 2},
}
"""What is told of the run that trains each."""

SEEDS = (0, 1, 2)

Study = dict[str, Any]
"""``{"networks": {network: {seed: {…, "criteria": {criterion: row}}}}, "environment": …}``, as in ``study.json``."""


class LeNet(nn.Module):
    """Two convolutions with pooling and a hidden linear layer, each with BatchNorm and ReLU, for images of 8×8.

    Source: LeCun, Bottou, Bengio, Haffner: "Gradient-based learning applied to document recognition", 1998; with
        rectifiers and BatchNorm in place of what was usual then.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, 8, 8]`` to logits ``[N, num_classes]``."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


def criteria_on(network: str, everything: bool) -> list[str]:
    """What is measured; of the criteria that take a backward pass a unit, on the residual networks one."""
    left_out = {"obd"} if network != LENET and not everything else set()
    return [name for name in CRITERIA if name not in left_out]


def measure(network: str, seed: int, **changes: Any) -> Study:
    """One network trained from one seed: a row for every criterion.

    Args:
        network: of ``NETWORKS``.
        seed: of initialisation, the order of examples and random probes.
        changes: of the run, such as ``epochs``; ``batches`` and ``criteria`` of the question.
    """
    question = Question(changes.pop("criteria", "all"), {}, changes.pop("batches", None))
    with tempfile.TemporaryDirectory() as folder:
        options = {**NETWORKS[network], "device": "cpu", "seed": seed, "out": Path(folder) / "run", **changes}
        config = RunConfig(**options)
        answer = run_comparison(config, question)
    return {"base_accuracy": answer.facts["base_accuracy"], **facts(answer.comparison)}


def facts(found: Comparison) -> Study:
    """What is kept of a comparison: everything but the values of single units."""
    return {
        "units": {name: len(change) for name, change in found.truth.items()},
        "examples": found.examples,
        "loss": found.intact.loss,
        "accuracy": found.intact.metric,
        "pass_seconds": found.pass_seconds,
        "oracle_seconds": found.oracle_seconds,
        "criteria": {
            row.criterion: {"reason": row.reason}
            if row.agreement is None
            else {
                "overall": plain(row.agreement.overall),
                "layers": plain(row.agreement.mean),
                "seconds": row.seconds,
                "relative": row.relative,
            }
            for row in found.rows
        },
    }


def spearman(study: Study, network: str, criterion: str) -> list[float]:
    """Spearman's ρ over all layers, by seed; shorter where the criterion could not be had."""
    rows = [run["criteria"].get(criterion, {}) for run in study["networks"].get(network, {}).values()]
    return [row["overall"]["spearman"] for row in rows if row.get("overall")]


def promises(study: Study) -> list[tuple[str, bool]]:
    """What was promised of the residual network, early and late in training, with what came out: ``(text, kept)``."""
    return [kept for network in (EARLY, RESIDUAL) for kept in _promises_on(study, network)]


def _promises_on(study: Study, network: str) -> list[tuple[str, bool]]:
    names = ("taylor_fo", "taylor_so", "taylor_so_hessian", "magnitude")
    rho = {name: spearman(study, network, name) for name in names}
    missing = [name for name, values in rho.items() if len(values) < len(SEEDS)]
    if missing:
        return [(f"{network}: not measured on {len(SEEDS)} seeds: {', '.join(missing)}", False)]
    fo, so, exact, magnitude = rho.values()
    mean = statistics.fmean
    return [
        (f"{network}: taylor_fo: ρ at least 0.90 on every seed: {_numbers(fo)}", min(fo) >= 0.90),
        (f"{network}: taylor_so: ρ at least 0.97 on average: {mean(so):.3f}", mean(so) >= 0.97),
        (f"{network}: taylor_so: ρ at least 0.95 on every seed: {_numbers(so)}", min(so) >= 0.95),
        (
            f"{network}: taylor_so within 0.015 of taylor_so_hessian on average: {mean(so):.3f} and {mean(exact):.3f}",
            abs(mean(so) - mean(exact)) <= 0.015,
        ),
        (
            f"{network}: magnitude at least 0.25 below taylor_fo on every seed: {_numbers(magnitude)}",
            min(a - b for a, b in zip(fo, magnitude, strict=True)) >= 0.25,
        ),
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where ``--check`` finds a promise missed."""
    asked = _parser().parse_args(arguments)
    study: Study = {"networks": {}, "environment": environment("cpu")}
    try:
        for network in asked.networks:
            for seed in asked.seeds:
                study["networks"].setdefault(network, {})[str(seed)] = found = measure(
                    network, seed, criteria=criteria_on(network, asked.all)
                )
                print(f"{network}, seed {seed}: oracle {found['oracle_seconds']:.0f} s; {_best(found['criteria'])}")
                sys.stdout.flush()
        write(study, asked.results)
    except TaylorError as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    kept = promises(study)
    print("\n".join(f"{'kept  ' if good else 'missed'}  {text}" for text, good in kept))
    return 1 if asked.check and not all(good for _, good in kept) else 0


def _best(criteria: Mapping[str, Any]) -> str:
    found = [
        f"{name} {row['overall']['spearman'] or float('nan'):.3f}" for name, row in criteria.items() if "overall" in row
    ]
    return f"ρ: {', '.join(found)}"


def write(study: Study, results: Path) -> None:
    """The three files."""
    results.mkdir(parents=True, exist_ok=True)
    text = markdown(study, promises(study))
    for name, content in (("study.json", json.dumps(plain(study), indent=1) + "\n"), ("study.md", text)):
        with replacing(results / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_picture(study, results / "study.png")
    print(f"written: {results / 'study.json'}, study.md, study.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m taylor_cuda.bench.study", description="Every criterion against the truth, on digits"
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    parser.add_argument("--all", action="store_true", help="every criterion on every network, minutes more a seed")
    parser.add_argument("--check", action="store_true", help="fail where a promise is missed")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="write here (default: bench/results)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
