import json
import sys

import pytest

from taylor_cuda.errors import InputError
from taylor_cuda.train.logs import RunLog


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_events_are_lines_with_their_minibatch(tmp_path):
    log = RunLog(tmp_path / "new" / "log.jsonl")
    assert log.size() == 0
    log.begin()
    log.write({"event": "epoch", "loss": 0.5}, 3)
    log.write({"event": "pruned"}, 4)
    assert lines(tmp_path / "new" / "log.jsonl") == [
        {"event": "epoch", "loss": 0.5, "step": 3},
        {"event": "pruned", "step": 4},
    ]
    log.begin()
    assert log.size() == 0


def test_what_came_after_a_checkpoint_is_forgotten(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"event": "a"}, 1)
    size = log.size()
    log.write({"event": "b"}, 2)
    again = RunLog(tmp_path / "log.jsonl")
    again.go_on(size, 1)
    again.write({"event": "c"}, 2)
    assert [line["event"] for line in lines(tmp_path / "log.jsonl")] == ["a", "c"]


def test_tensorboard_gets_the_numbers_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "log.jsonl", tensorboard=True)
    log.write({"event": "start", "seed": 3, "compile": True}, 0)
    log.write({"event": "epoch", "stage": "base", "loss": 0.5, "name": "x"}, 3)
    size = log.size()
    log.write({"event": "epoch", "stage": "base", "loss": 0.4}, 6)  # lost: the run went on from minibatch 3
    again = RunLog(tmp_path / "log.jsonl", tensorboard=True)
    again.go_on(size, 3)
    again.write({"event": "epoch", "stage": "base", "loss": 0.3}, 6)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"start/seed", "base/loss"}
    assert [(event.step, round(event.value, 3)) for event in found.Scalars("base/loss")] == [(3, 0.5), (6, 0.3)]
    again.begin()
    assert list((tmp_path / "tensorboard").iterdir()) == []


def test_a_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"tensorboard: it is not installed .*pip install tensorboard"):
        RunLog(tmp_path / "log.jsonl", tensorboard=True)
