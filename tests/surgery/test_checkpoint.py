"""``tc.save`` and ``tc.load``: one file, complete or not there, into a fresh model or not at all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import taylor_cuda.surgery.checkpoint as checkpoint
from taylor_cuda import files
from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.surgery import cut, load, read_metadata, save
from tests.surgery.nets import NETS, ConvBias, ConvBN, Residual, Tied, make, random_keep
from tests.surgery.state import all_tensors, differences, fingerprint


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "small.safetensors"


def pruned(net=ConvBN, **options):
    model, x, groups = make(net, **options)
    cut(model, groups, random_keep(groups, 3))
    return model, x


@pytest.mark.parametrize("net", NETS)
def test_a_pruned_model_comes_back_bit_for_bit(net, file, monkeypatch):
    model, x = pruned(net)
    save(model, file)
    fresh = make(net, seed=5)[0]
    with monkeypatch.context() as patch:
        patch.setattr(type(fresh), "forward", None)  # no tracing: the model is not run
        assert load(fresh, file) is fresh
    for (name, a), b in zip(all_tensors(model).items(), all_tensors(fresh).values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert fresh.taylor_cuda_recipe == model.taylor_cuda_recipe
    assert [repr(m) for m in fresh.modules()] == [repr(m) for m in model.modules()]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_model_that_was_never_cut_comes_back_and_can_be_cut(file):
    model, x, _ = make(ConvBN)
    save(model, file)
    fresh = load(make(ConvBN, seed=5)[0], file)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    groups = fresh.groups(x)
    cut(fresh, groups, random_keep(groups))


def test_a_loaded_model_is_saved_and_loaded_again(file):
    model, x = pruned(Residual)
    save(model, file)
    again = load(make(Residual, seed=5)[0], file)
    save(again, file)
    assert torch.equal(load(make(Residual, seed=6)[0], file).eval()(x), model.eval()(x))
    other, _ = pruned(Residual, seed=8)
    load(other, file)  # cut to the same widths already: only values change
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_another_process_needs_nothing_but_the_file_and_the_class(file):
    model, x = pruned(Residual)
    save(model, file)
    torch.save((x, model.eval()(x).detach()), file.with_suffix(".pt"))
    code = (
        "import sys, torch\n"
        "from taylor_cuda.surgery import load\n"
        "from tests.surgery.nets import Residual\n"
        "torch.set_num_threads(1)\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(load(Residual(), sys.argv[1]).eval()(x), y)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(file), str(file.with_suffix(".pt"))], check=True, cwd=Path(__file__).parents[2]
    )


class Odd(nn.Module):
    """Every kind of tensor a state dict may have."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.fp16 = nn.Parameter(torch.randn(3, 4, generator=generator).half())
        self.bf16 = nn.Parameter(torch.randn(3, 4, generator=generator).bfloat16())
        self.fp64 = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(4, 3, generator=generator).t())
        self.last = nn.Parameter(torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last))
        self.register_buffer("mask", torch.rand(5, generator=generator) > 0.5)
        self.register_buffer("count", torch.randint(0, 99, (), generator=generator))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("wave", torch.randn(3, generator=generator, dtype=torch.complex64))
        self.register_buffer("grid", torch.arange(3.0), persistent=False)
        base = torch.randn(10, generator=generator)
        self.register_buffer("front", base[:6])
        self.register_buffer("back", base[4:])


def test_any_dtype_and_layout_is_stored(file):
    model, fresh = Odd(1), Odd(2)
    strides = {name: tensor.stride() for name, tensor in all_tensors(fresh).items()}
    save(model, file)
    load(fresh, file)
    for (name, a), b in zip(all_tensors(model).items(), all_tensors(fresh).values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
        assert b.stride() == strides[name]
    assert "grid" not in load_file(file)


def test_non_persistent_buffers_are_cut_but_not_stored(file):
    class Positions(ConvBias):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.arange(6.0).view(6, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv1(x) + self.offset)
            return self.head(torch.relu(self.conv2(x)).mean((2, 3)))

        def channel_groups(self):
            first, second = super().channel_groups()
            member = type(first.members[1])("offset", 0, first.members[1].index, "other")
            return [type(first)(first.name, (*first.members, member), first.kept, first.original_size), second]

    model, x = pruned(Positions)
    save(model, file)
    fresh = load(make(Positions, seed=4)[0], file)
    assert fresh.offset.shape == model.offset.shape
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert "offset" not in load_file(file)


def test_shared_tensors_are_stored_once(file):
    model, x = pruned(Tied)
    save(model, file)
    assert {"again.weight", "also_scale"}.isdisjoint(load_file(file))
    fresh = load(make(Tied, seed=4)[0], file)
    assert fresh.scale is fresh.also_scale
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_any_safetensors_reader_reads_it(file):
    model, _ = pruned()
    save(model, file, metadata={"accuracy": 0.97})
    plain = load_file(file)
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
    with safetensors.safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["taylor_cuda"])
    assert header["recipe"] == model.taylor_cuda_recipe
    assert b"pickle" not in file.read_bytes()


def test_metadata_comes_back(file):
    save(make(ConvBN)[0], file, metadata={"accuracy": 0.97, "budget": {"macs": 0.5}, "name": "Ω"})
    assert read_metadata(file) == {"accuracy": 0.97, "budget": {"macs": 0.5}, "name": "Ω"}
    save(make(ConvBN)[0], file)
    assert read_metadata(file) == {}
    for bad in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(InputError, match="metadata"):
            save(make(ConvBN)[0], file, metadata=bad)
    assert read_metadata(file) == {}


def test_the_model_keeps_its_memory_format_modes_and_frozen_parameters(file):
    model, _ = pruned()
    save(model, file)
    fresh = make(ConvBN, seed=5)[0].to(memory_format=torch.channels_last).eval()
    fresh.conv1.weight.requires_grad_(False)
    load(fresh, file)
    assert fresh.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not fresh.conv1.weight.requires_grad
    assert fresh.conv2.weight.requires_grad
    assert not fresh.training


def test_values_are_widened_but_never_rounded(file):
    model, _ = pruned(dtype=torch.bfloat16)
    save(model, file)
    wide = load(make(ConvBN, seed=5)[0], file)
    assert wide.conv1.weight.dtype == torch.float32
    assert torch.equal(wide.conv1.weight, model.conv1.weight.float())
    save(wide, file)
    narrow = make(ConvBN, dtype=torch.bfloat16)[0]
    before = fingerprint(narrow)
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight is torch\.float32 in it, which the model's torch\.bfloat16"
    ):
        load(narrow, file)
    save(make(ConvBN, dtype=torch.float16)[0], file)
    with pytest.raises(CheckpointError, match="can't hold"):
        load(narrow, file)
    assert not differences(before, fingerprint(narrow))


def unchanged_by(model, file, message, **options):
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(model, file, **options)
    assert str(file) in str(caught.value)
    assert not differences(before, fingerprint(model))


def test_a_missing_file_is_named(file):
    unchanged_by(make(ConvBN)[0], file, "no such file")
    unchanged_by(make(ConvBN)[0], file.parent, "no such file")


def test_a_truncated_file_is_refused_wherever_it_ends(file):
    model, _ = pruned()
    save(model, file)
    whole = file.read_bytes()
    fresh = make(ConvBN, seed=5)[0]
    for end in [0, 4, 8, 9, 200, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        file.write_bytes(whole[:end])
        unchanged_by(fresh, file, "damaged")
    file.write_bytes(b"PK\x03\x04 not ours at all")
    unchanged_by(fresh, file, "damaged")


def test_a_flipped_bit_is_found_wherever_it_is(file):
    model, _ = pruned()
    save(model, file)
    whole = file.read_bytes()
    fresh = make(ConvBN, seed=5)[0]
    header = int.from_bytes(whole[:8], "little")
    for place in [8 + header + 1, len(whole) - 1, (8 + header + len(whole)) // 2]:
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        unchanged_by(fresh, file, "damaged: its weights don't have the checksum")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("recipe"),
        lambda header: header.update(recipe=3),
        lambda header: header.update(format=99),
        lambda header: header.update(aliases={"head.weight": "nothing"}),
        lambda header: header["recipe"].update(tensors={"conv1.weight": {"0": {"length": 6, "kept": "0-9999999999"}}}),
    ],
)
def test_a_damaged_header_is_refused(change, file):
    model, _ = pruned()
    save(model, file)
    with safetensors.safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["taylor_cuda"])
    change(header)
    save_file(load_file(file), file, {"taylor_cuda": json.dumps(header)})
    unchanged_by(make(ConvBN, seed=5)[0], file, "damaged|format 99|recipe")
    save_file(load_file(file), file, {"taylor_cuda": "{"})
    unchanged_by(make(ConvBN, seed=5)[0], file, "header is damaged")


def test_a_checkpoint_of_another_model_is_refused_and_says_why(file):
    class More(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    class OtherHead(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 7)

    model, _ = pruned()
    save(model, file)
    unchanged_by(make(Tied)[0], file, "made for another model; this one has no tensor named")
    unchanged_by(make(More)[0], file, r"another model: it has no extra\.weight; it has no extra\.bias")
    unchanged_by(make(OtherHead)[0], file, r"head\.weight is \(4, \d\) in it, \(7, \d\) in the model once cut")
    save(make(More)[0], file)
    unchanged_by(make(ConvBN)[0], file, r"it has extra\.weight, the model hasn't")
    assert load(make(ConvBN)[0], file, strict=False).conv1.out_channels == 6
    save(make(ConvBN)[0], file)
    more = make(More, seed=3)[0]
    kept = more.extra.weight.clone()
    load(more, file, strict=False)
    assert torch.equal(more.extra.weight, kept)
    save(make(OtherHead)[0], file)
    unchanged_by(make(ConvBN)[0], file, r"head\.weight is", strict=False)
    unchanged_by(make(Residual)[0], file, r"; and \d+ more$")


def test_a_model_that_was_cut_otherwise_is_refused(file):
    model, _, groups = make(ConvBN)
    cut(model, groups, {"conv2": torch.tensor([1, 2])})
    save(model, file)
    other, _, groups = make(ConvBN)
    cut(other, groups, {"conv2": torch.tensor([0, 2])})
    unchanged_by(other, file, "give it as it was made")


def test_plain_safetensors_are_read_where_they_fit(file):
    model, x, _ = make(ConvBN)
    save_file(model.state_dict(), file)
    assert torch.equal(load(make(ConvBN, seed=5)[0], file).eval()(x), model.eval()(x))
    unchanged_by(pruned()[0], file, "in the model once cut")
    assert read_metadata(file) == {}
    tied = make(Tied)[0]
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    save_file(state, file)
    load(tied, file)
    state["also_scale"] += 1
    save_file(state, file)
    unchanged_by(tied, file, "also_scale and scale differ in it and are one tensor in the model")


def test_a_model_without_memory_is_refused(file):
    save(make(ConvBN)[0], file)
    with torch.device("meta"):
        model = ConvBN()
    with pytest.raises(CheckpointError, match="no tensor with memory"):
        load(model, file)
    with pytest.raises(InputError, match="on meta"):
        save(model, file)


def test_what_a_file_can_not_hold_is_named(file):
    class Extra(ConvBN):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(InputError, match="_extra_state in its state_dict is a dict"):
        save(Extra(), file)
    with pytest.raises(InputError, match=r"model\.module"):
        save(nn.DataParallel(ConvBN()), file)
    with pytest.raises(InputError, match="existing folder"):
        save(ConvBN(), file.parent / "nowhere" / "x.safetensors")
    with pytest.raises(InputError, match="existing folder"):
        save(ConvBN(), file.parent)
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("stage", ["save_file", "flush"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file_alone(stage, error, file, monkeypatch):
    model, x = pruned()
    save(model, file)
    old = file.read_bytes()

    def failing(*args, **_kwargs):
        if stage == "save_file":
            Path(args[1]).write_bytes(old[:100])
        raise error

    monkeypatch.setattr(checkpoint if stage == "save_file" else files, stage, failing)
    with pytest.raises(type(error)):
        save(make(ConvBN)[0], file)
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert x is not None


def test_nan_weights_come_back(file):
    model = make(Tied)[0]
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    save(model, file)
    assert load(make(Tied, seed=3)[0], file).scale.isnan().all()
    assert not copy.deepcopy(model).stem.weight.isnan().any()
