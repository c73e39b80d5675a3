"""A whole run on two ranks is the run of one process on the same minibatches."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from taylor_cuda.distributed import gathered
from taylor_cuda.errors import TaylorError
from taylor_cuda.train import RunConfig, Summary, run
from taylor_cuda.train.batch_norm import recalibrate_batch_norm
from taylor_cuda.train.data import TensorData
from taylor_cuda.train.launch import Launch
from taylor_cuda.train.session import Session
from taylor_cuda.train.stopping import RunInterruptedError
from tests.ranks import check_passed, on_ranks
from tests.train.image_folders import make_image_folder

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

NET = "tests.train.digits_nets:smooth"
CPU = torch.device("cpu")


def config(out: Path, **changes: Any) -> RunConfig:
    options = {
        **{"model": NET, "epochs": 1, "steps_limit": 6, "every": 3, "steps": 2, "round_to": 1, "oracle": 0},
        **{"measure_seconds": 0.01, "global_batch": 64, "budget": {"macs": 0.6}, "out": out, "device": "cpu"},
    }
    return RunConfig(**{**options, **changes})


def records(out: Path, event: str) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def check_same(summary: Summary, out: Path, alone: Path, epochs: tuple[str, ...] = ("epoch",)) -> None:
    """Plans by their digests; losses, accuracies and weights but for the order of sums."""
    assert [record["plan"] for record in records(out, "prune")] == [r["plan"] for r in records(alone, "prune")]
    for event in (*epochs, "base", "pruned", "finetuned"):
        for mine, other in zip(records(out, event), records(alone, event), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert abs(mine["accuracy"] - other["accuracy"]) <= 1 / 300
    assert summary.widths == {name: tuple(both) for name, both in _summary(alone)["widths"].items()}
    for name, value in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(value, load_file(alone / "model.safetensors")[name], rtol=1e-3, atol=1e-4)


def _summary(alone: Path) -> dict[str, Any]:
    return json.loads((alone / "summary.json").read_text(encoding="utf-8"))


def prunes_alike(folder: Path, name: str, **changes: Any) -> None:
    out = folder / name
    check_same(run(config(out, **changes)), out, folder / "alone")
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model.safetensors"]


def all_ranks_stop_where_one_is_told_to(rank: int, folder: Path) -> None:
    original, seen = TensorData.train, []

    def train(self: TensorData, epoch: int, start: int = 0) -> Any:
        for batch in original(self, epoch, start):
            seen.append(1)
            if rank == 1 and len(seen) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    out = folder / "stopped"
    TensorData.train = train  # type: ignore[method-assign]
    try:
        with pytest.raises(RunInterruptedError, match="state saved"):
            run(config(out, recalibrate=0))
    finally:
        TensorData.train = original  # type: ignore[method-assign]
    dist.barrier()
    assert len(list((out / "checkpoints").iterdir())) >= 1
    dist.barrier()
    summary = run(config(out, recalibrate=0), resume="auto")
    check_same(summary, out, folder / "alone", epochs=())  # the epoch that was broken off tells of its end only
    assert not (out / "checkpoints").exists()


def files_of_all_ranks_are_named(rank: int, folder: Path) -> None:
    out = folder / "unreadable"
    options = {
        **{"model": "timm:resnet10t", "data": str(folder / "images"), "image_size": 32, "workers": 0, "epochs": 1},
        **{"global_batch": 4, "every": 1, "steps": 1, "finetune_epochs": 0, "steps_limit": None},
    }
    summary = run(config(out, **options))
    named = {Path(record["path"]).name for record in records(out, "unreadable")}
    assert named == {"0.jpg", "1.jpg", "2.jpg"}
    assert rank > 0 or summary.unreadable == 3


def counted_average(calls, bucket):
    """A communication hook. Torch refuses annotations that are strings."""
    calls.append(1)
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda future: future.value()[0])


def gradients_are_averaged_once_a_minibatch(rank: int, folder: Path) -> None:
    session = Session(config(folder / "counted", batch=16), Launch(CPU, rank, 2, dist.group.WORLD))
    calls: list[int] = []
    session.trained.register_comm_hook(calls, counted_average)
    step, counts = session.new_step(), []
    for images, labels in itertools.islice(session.data.train(0), 4):
        step(images, labels)
        counts.append(len(calls))
    assert counts[0] == 0 < counts[1] == counts[2] < counts[3]
    session.check_in_sync()


def statistics_are_those_of_all_ranks(rank: int, folder: Path) -> None:
    """Each rank sees every second batch; their plain average is what one process takes from all of them."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 1, 6, 6, generator=generator, dtype=torch.float64) for _ in range(6)]
    recalibrate_batch_norm(models[0], batches[rank::2], group=dist.group.WORLD)
    recalibrate_batch_norm(models[1], batches)
    for mine, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def random_numbers_of_training_differ(rank: int, folder: Path) -> None:
    Session(config(folder / "random"), Launch(CPU, rank, 2, dist.group.WORLD))
    first, second = gathered(torch.rand(3).tolist(), dist.group.WORLD)
    assert first != second


def ranks_that_came_apart_are_noticed(rank: int, folder: Path) -> None:
    session = Session(config(folder / "apart"), Launch(CPU, rank, 2, dist.group.WORLD))
    session.check_in_sync()
    if rank == 1:
        with torch.no_grad():
            session.model.head.bias[0] += 1e-6
    with pytest.raises(TaylorError, match=r"ranks \[1\] no longer have the parameters of rank 0"):
        session.check_in_sync()


def a_refusal_reaches_all_ranks(rank: int, folder: Path) -> None:
    with pytest.raises(TaylorError, match="checkpoints of a run that has not ended"):
        run(config(folder / "unfinished"))


def cases(rank: int, folder: Path) -> Mapping[str, Callable[[], None]]:
    return {
        "halves": lambda: prunes_alike(folder, "halves"),
        "quarters": lambda: prunes_alike(folder, "quarters", batch=16),
        "stop": lambda: all_ranks_stop_where_one_is_told_to(rank, folder),
        "unreadable": lambda: files_of_all_ranks_are_named(rank, folder),
        "once": lambda: gradients_are_averaged_once_a_minibatch(rank, folder),
        "statistics": lambda: statistics_are_those_of_all_ranks(rank, folder),
        "random": lambda: random_numbers_of_training_differ(rank, folder),
        "apart": lambda: ranks_that_came_apart_are_noticed(rank, folder),
        "refusal": lambda: a_refusal_reaches_all_ranks(rank, folder),
    }


NAMES = tuple(cases(0, Path()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "alone").mkdir()
    summary = run(config(folder / "alone"))
    (folder / "alone" / "summary.json").write_text(json.dumps({"widths": summary.widths}), encoding="utf-8")
    images = make_image_folder(folder / "images", train=8, val=4, size=32)
    for kind, number in (("train", 1), ("train", 2), ("val", 0)):
        (images / kind / "ant" / f"{number}.jpg").write_bytes(b"no image")
    (folder / "unfinished").mkdir()
    Session(config(folder / "unfinished")).save()
    on_ranks(cases, folder, seconds=200)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", NAMES)
def test_two_ranks(case: str, rank: int, outcomes: Path) -> None:
    check_passed(case, rank, outcomes)
