"""More than one Ctrl-C, and ``--resume auto`` after the end."""

import os
import signal

import pytest
import torch

from tests.cli.test_prune import TINY, check_same_result, interrupt_at, names, prune


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert prune(*TINY, "--out", out) == 0
    return out


def interrupt_twice_after(monkeypatch, step):
    """Let two Ctrl-C come when the optimizer has taken a step that the run doesn't yet know of."""
    original, taken = torch.optim.SGD.step, []

    def take(self, *arguments):
        original(self, *arguments)
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.SGD, "step", take)


def test_a_second_ctrl_c_saves_nothing_half_done(monkeypatch, capsys, tmp_path, straight):
    with monkeypatch.context() as patch:
        interrupt_twice_after(patch, 4)
        assert prune(*TINY, "--checkpoint-every", "2", "--out", tmp_path) == 130
    assert f"interrupted in stage 'base'; the last checkpoint is in {tmp_path}" in capsys.readouterr().err
    assert [path.name[:8] for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
    assert prune(*TINY, "--out", tmp_path, "--resume") == 0
    check_same_result(tmp_path, straight)


def test_a_second_ctrl_c_before_any_checkpoint(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        interrupt_twice_after(patch, 2)
        assert prune(*TINY, "--out", tmp_path) == 130
    assert "interrupted before there was anything to save" in capsys.readouterr().err
    assert names(tmp_path) == ["log.jsonl"]


def test_further_ctrl_c_while_the_state_is_saved(monkeypatch, capsys, tmp_path, straight):
    """One waits for the file; of two, the second leaves it, and the one before is what there is."""
    original, saved = torch.save, []

    def save_slowly(state, path):
        original(state, path)
        saved.append(path)
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, "signal")
        patch.setattr(torch, "save", save_slowly)
        assert prune(*TINY, "--checkpoint-every", "2", "--eval-every", "1", "--out", tmp_path) == 130
    assert "the last checkpoint is in" in capsys.readouterr().err
    assert [path.name[:8] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000002", "00000004"]
    assert prune(*TINY, "--eval-every", "1", "--out", tmp_path, "--resume") == 0
    check_same_result(tmp_path, straight)


def test_auto_does_not_repeat_a_run_that_has_ended(capsys, straight):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    assert prune(*TINY, "--out", straight, "--resume", "auto") == 0
    assert f"this run has ended: its results are in {straight}" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taylor_cuda.cli.prune.run_pruning", started)
        for other in (("--resume", "auto", "--seed", "1"), ()):
            with pytest.raises(ZeroDivisionError):
                prune(*TINY, "--out", straight, *other)


def started(*_, **__):
    """What a run raises in place of beginning."""
    raise ZeroDivisionError
