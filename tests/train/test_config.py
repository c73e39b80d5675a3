import pytest
import torch

from taylor_cuda.errors import InputError
from taylor_cuda.train.config import RunConfig


@pytest.mark.parametrize(
    ("batch", "global_batch", "ranks", "expected"),
    [
        (None, None, 1, (64, 1)),
        (None, None, 4, (256, 1)),
        (32, None, 4, (128, 1)),
        (None, 2048, 8, (2048, 1)),
        (128, 2048, 8, (2048, 2)),
        (16, 64, 1, (64, 4)),
    ],
)
def test_a_minibatch_is_divided_over_ranks_and_passes(batch, global_batch, ranks, expected):
    assert RunConfig(batch=batch, global_batch=global_batch).split(ranks) == expected


@pytest.mark.parametrize(
    ("batch", "global_batch", "ranks", "message"),
    [
        (None, 100, 8, "global_batch: wanted a multiple of 8 ranks, got 100"),
        (48, 128, 1, "global_batch: wanted a multiple of 1 ranks of 48, got 128"),
        (128, 64, 1, "global_batch: wanted a multiple of 1 ranks of 128, got 64"),
        (1, None, 1, "batch: wanted passes over at least 2 examples, got 1"),
        (1, 8, 1, "batch: wanted passes over at least 2 examples, got 1"),
        (None, 4, 4, "batch: wanted passes over at least 2 examples, got 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(batch, global_batch, ranks, message):
    with pytest.raises(InputError, match=message):
        RunConfig(batch=batch, global_batch=global_batch).split(ranks)


def test_sixteen_bits_on_a_gpu_want_widths_in_eights():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert RunConfig(round_to="auto", amp="bf16").rounded_to(cuda) == 8
    assert RunConfig(round_to="auto", amp="bf16").rounded_to(cpu) == "auto"
    assert RunConfig(round_to="auto").rounded_to(cuda) == "auto"
    assert RunConfig(round_to=4, amp="fp16").rounded_to(cuda) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amp": "fp8"}, "amp: wanted one of off, bf16, fp16, got 'fp8'"),
        ({"ema": 1.0}, r"ema: wanted a number in \[0, 1\), got 1.0"),
        ({"distill": 1.1}, r"distill: wanted a number in \[0, 1\], got 1.1"),
        ({"clip": 0.0}, "clip: wanted a number above 0, got 0.0"),
        ({"warmup_epochs": -1.0}, "warmup_epochs: wanted a number of at least 0, got -1.0"),
        ({"checkpoints": 0}, "checkpoints: wanted a number of at least 1, got 0"),
        ({"total_epochs": 3, "finetune_epochs": 2}, "total_epochs: wanted it or finetune_epochs, got both"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        RunConfig(**changes)


def test_a_run_is_the_same_however_its_minibatches_are_divided():
    one, other = RunConfig(batch=64), RunConfig(batch=16, global_batch=64, workers=9, checkpoint_every=3)
    assert one.identity() == other.identity()
    assert one.identity() != RunConfig(batch=64, ema=0.9).identity()
