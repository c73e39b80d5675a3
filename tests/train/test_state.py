import pytest
import torch

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.files import remove_remains, replacing
from taylor_cuda.train.state import Checkpoints, generator_states, load_state, restore_generators

CPU = torch.device("cpu")


def test_state_round_trip_with_generators(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    torch.manual_seed(5)
    torch.rand(3)
    state = {"weights": torch.arange(3.0), "plain": {"a": [1, None, "x"]}, "generators": [generator_states()]}
    path = checkpoints.save(7, state)
    expected = torch.rand(4)
    torch.rand(9)
    assert checkpoints.newest() == path
    state = load_state(path, CPU)
    restore_generators(state["generators"][0])
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(state["weights"], torch.arange(3.0))
    assert state["plain"] == {"a": [1, None, "x"]}
    assert list(path.parent.iterdir()) == [path]


def test_the_last_few_stay_and_can_be_cleared(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    paths = [checkpoints.save(step, {"step": step}) for step in (5, 99_999_999, 100_000_000)]
    assert sorted(paths[0].parent.iterdir()) == sorted(paths[1:])
    assert checkpoints.newest() == paths[2]
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
    checkpoints.clear()


def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first, second = (checkpoints.save(step, {"weights": torch.full((1000,), float(step))}) for step in (1, 2))
    whole = second.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:10], whole[: len(whole) // 2], bytes(flipped)):
        second.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged .*trying the one before"):
            assert checkpoints.newest() == first
    first.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.newest() is None


def test_what_was_passed_over_takes_no_place_of_a_whole_one(tmp_path):
    """Going on from 3, the run comes to 6 again: there the damaged one is, under whatever checksum."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    first, damaged = (checkpoints.save(step, {"step": step}) for step in (3, 6))
    damaged.rename(tmp_path / "00000006-ffffffffffffffff.pt")
    again = checkpoints.save(6, {"step": 6})
    assert sorted(tmp_path.iterdir()) == [first, again]
    again.rename(tmp_path / "00000009-ffffffffffffffff.pt")
    assert Checkpoints(tmp_path, keep=1).save(4, {"step": 4}).parent == tmp_path
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["00000004"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".state.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    Checkpoints(tmp_path).newest()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    remove_remains(tmp_path / "nowhere")


def test_files_that_are_no_states(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(InputError, match=r"no file .*all processes of the run can read"):
        load_state(path, CPU)
    path.write_bytes(b"text")
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
