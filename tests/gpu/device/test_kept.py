"""The ops on kept channels on a GPU, bit by bit against their definitions. Graphs and streams are in test_every_op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from taylor_cuda.ops import gather_kept, reference, scatter_kept
from tests.gpu.cases import Ops
from tests.ops import kept_cases as cases

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
DTYPES = {name: dtype for name, dtype in cases.DTYPES.items() if dtype != torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", cases.ACTIVATIONS)
def test_packing_is_exact(native: Ops, layout: str, dtype: str) -> None:
    x = cases.ACTIVATIONS[layout](cases.maker(DTYPES[dtype], device="cuda"))
    for kind in cases.LISTS:
        assert cases.check_pack(native, x, cases.kept_of(x.shape[1], kind)) == [], kind


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(256, 64, 56, 56), (64, 512, 28, 28), (256, 2048, 7, 7), (64, 768, 197)], ids=str)
def test_packing_activations_of_networks(native: Ops, shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x = x.transpose(1, -1).contiguous().transpose(1, -1) if channels_last else x
    assert cases.check_pack(native, x, cases.kept_of(shape[1], "half and none")) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", cases.KINDS, ids=str)
def test_weights_of_every_layout(native: Ops, kinds: tuple[str | None, str | None], dtype: str) -> None:
    make = cases.maker(DTYPES[dtype], device="cuda")
    weights = [weight(make) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(weights, [kinds] * len(weights), "cuda")
    for cast, to in ((False, torch.float16), (True, torch.bfloat16), (True, torch.float32)):
        assert cases.check_gather(native, weights, keep, bounds, [cast] * len(weights), to) == []
        values = reference.gather_kept(weights, keep, bounds, [cast] * len(weights), to)
        assert cases.check_scatter(native, values, weights, keep, bounds) == []


def test_a_weight_of_more_than_two_to_the_31_elements(native: Ops) -> None:
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    weight = torch.empty(2**21 + 8, 1024, device="cuda", dtype=torch.bfloat16).normal_()
    keep = torch.arange(0, 2**21 + 8, 2, device="cuda")
    bounds = [0, len(keep), len(keep)]
    (half,) = native.gather_kept([weight], keep, bounds, [False], torch.float32)
    assert torch.equal(half, weight[::2])
    native.scatter_kept([half * 2], [weight], keep, bounds, True)
    assert torch.equal(weight[::2], half * 2)
    assert int(weight[1::2].count_nonzero()) == 0


def test_a_network_is_gathered_and_scattered_without_waiting(
    native: Ops, no_synchronization: Callable[[], None]
) -> None:
    """Through the public functions, in fp32 masters and bf16 values; in the layouts that take a copy too."""
    weights = [weight(cases.maker(torch.float32, device="cuda")) for weight in cases.WEIGHTS.values()]
    keep, bounds = cases.lists_for(weights, [("half", "half and none")] * len(weights), "cuda")
    cast = [True] * len(weights)
    values = gather_kept(weights, keep, bounds, cast, torch.bfloat16)
    torch.cuda.synchronize()
    no_synchronization()
    again = gather_kept(weights, keep, bounds, cast, torch.bfloat16)
    scatter_kept(again, weights, keep, bounds, True)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, values, again))
    assert all(map(torch.equal, values, reference.gather_kept(weights, keep, bounds, cast, torch.bfloat16)))
