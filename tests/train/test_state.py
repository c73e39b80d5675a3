import os
import signal
import threading

import pytest
import torch

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.files import replacing
from taylor_cuda.train.state import load_state, restore_rng, save_state, stop_between_steps

CPU = torch.device("cpu")


def test_first_interrupt_waits_for_the_check():
    with stop_between_steps() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked  # still here: nothing was raised between two bytecodes of a step
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        stop.check()


def test_second_interrupt_is_immediate():
    with stop_between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_between_steps():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_left_alone():
    seen = []

    def work():
        with stop_between_steps() as stop:
            stop.check()
            seen.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_state_round_trip_with_generators(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    torch.manual_seed(5)
    torch.rand(3)
    save_state(path, {"weights": torch.arange(3.0), "plain": {"a": [1, None, "x"]}})
    expected = torch.rand(4)
    torch.rand(9)
    state = load_state(path, CPU)
    restore_rng(state)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert state["plain"] == {"a": [1, None, "x"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pt"]


def test_states_that_cannot_be_used(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError, match="nothing to go on from"):
        load_state(path, CPU)
    save_state(path, {"weights": torch.zeros(1000)})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(path, CPU)
    torch.save({"something": 1}, path)
    with pytest.raises(CheckpointError, match="was not written by this version"):
        load_state(path, CPU)


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old", encoding="utf-8")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("ha", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
