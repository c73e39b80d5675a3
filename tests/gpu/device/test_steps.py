"""What follows the sums on a GPU: the end of a scoring step, and masks of the largest scores."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda import ops as public
from tests.gpu import cases
from tests.gpu.cases import Ops
from tests.gpu.device.common import capture_and_compare

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("n", [0, 1, 33, 9000, 65_536, 1_000_003])
def test_keep_mask_keeps_what_a_sorted_list_does(native: Ops, n: int) -> None:
    for kinds, keep in ((1, n // 2), (40, n - 1), (10**6, 0), (10**6, n // 3), (10**6, n + 1)):
        scores = cases.make_scores(n, kinds, seed=kinds, device="cuda")
        assert cases.check_keep_mask(native.keep_mask, scores, keep) == []
        assert cases.check_keep_mask(native.keep_mask, scores[::2], keep // 2) == []


def test_keep_mask_is_captured_and_does_not_wait(native: Ops, no_synchronization: Callable[[], None]) -> None:
    """How many stay is in device memory: a replay takes the number that is there then."""
    scores, keep = cases.make_scores(20_000, 10**6, seed=0, device="cuda"), torch.tensor(5000, device="cuda")
    capture_and_compare(lambda: list(native.keep_mask(scores.nan_to_num(), keep)), [scores], None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask, _ = native.keep_mask(scores, keep)
    keep.fill_(123)
    graph.replay()
    assert mask.sum().item() == 123
    no_synchronization()
    public.keep_mask(scores, 7)
    public.keep_mask(scores, keep)


def test_keep_mask_refuses_float64(native: Ops) -> None:
    with pytest.raises(RuntimeError, match="on the CPU only"):
        native.keep_mask(torch.ones(3, device="cuda").double(), torch.tensor(1, device="cuda"))


@pytest.mark.parametrize("case", cases.UNITS)
def test_accumulate_importance_matches_float64(native: Ops, case: str) -> None:
    assert cases.check_accumulate_importance(native, case, torch.float32, device="cuda") == []
    assert cases.check_accumulate_importance(native, case, torch.float64, device="cuda") == []


def test_a_graph_captures_a_scoring_step_and_skips_in_replay(native: Ops) -> None:
    names = ["filters", "filters, input side", "vector", "cut"]
    weights, gradients, dims = cases.make_weights(names, "fp32", device="cuda")
    total = sum(weight.shape[dim] for weight, dim in zip(weights, dims, strict=True))
    entries, offsets = torch.arange(total, device="cuda").flip(0), torch.arange(0, total + 1, 2, device="cuda")
    entries = entries[: int(offsets[-1])].contiguous()
    window, counts = torch.zeros(len(offsets) - 1, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    scale, finite = torch.tensor(3.0, device="cuda"), torch.tensor(True, device="cuda")

    def step() -> None:
        sums = native.weight_importance(weights, gradients, dims, "sum")
        native.accumulate_importance(sums, entries, offsets, window, counts, "batch", scale, None, finite, 0.9, 0.1)

    def replayed(run: Callable[[], None]) -> tuple[Tensor, list[int]]:
        window.fill_(1.0)
        counts.zero_()
        run()
        return window.clone(), counts.tolist()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # allocators fill before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for factor in (1.25, 2.0):
        for gradient in gradients:
            gradient.mul_(factor)
        expected, result = replayed(step), replayed(graph.replay)
        assert torch.equal(result[0], expected[0])
        assert result[1] == expected[1] == [1, 0]
    finite.fill_(False)
    assert replayed(graph.replay)[1] == [0, 1]
    finite.fill_(True)
    gradients[0].fill_(float("inf"))
    left, skipped = replayed(graph.replay)
    assert torch.equal(left, torch.ones_like(left))
    assert skipped == [0, 1]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fg", "taylor_weight", "taylor_output"])
def test_a_scoring_step_does_not_wait_for_the_gpu(
    native: Ops, no_synchronization: Callable[[], None], criterion: str, scaled: bool
) -> None:
    """From activations where the criterion needs them; the scores are those of the CPU."""
    assert native.accumulate_importance is not None
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3), torch.nn.SiLU())
    model, x = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)), torch.randn(4, 3, 10, 10)
    scores = []
    for device in ("cpu", "cuda"):
        here, batch = copy.deepcopy(model).to(device), x.to(device)
        scaler = torch.amp.GradScaler(device, init_scale=8.0) if scaled else None
        est = tc.Importance(here, tc.trace(here, batch), criterion)
        est.backward(here(batch).square().mean(), scaler=scaler)
        here.zero_grad()
        if device == "cuda":
            no_synchronization()
        est.backward(here(batch).square().mean(), scaler=scaler)
        torch.cuda.set_sync_debug_mode("default")
        assert (est.steps, est.skipped) == (2, 0)
        scores.append(est.scores())
    for name, expected in scores[0].items():
        torch.testing.assert_close(scores[1][name].cpu(), expected, rtol=1e-2, atol=1e-2 * float(expected.max()))
