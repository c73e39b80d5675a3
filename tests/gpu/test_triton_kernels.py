"""What single Triton kernels promise: loads and stores as wide as they say, one binary for networks of all widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import triton_launches
from tests.gpu.triton_launches import LAYOUTS, compile_for_hopper, layout

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton_launches.toolchain() is None,
    reason="nothing is compiled: TRITON_INTERPRET=1, or this triton has no cuobjdump",
)


def _plan(tensor: torch.Tensor, fold: bool) -> tuple[Any, Any]:
    """How a pair of such tensors is walked and tiled."""
    from taylor_cuda.kernels import _launch

    pair = _launch.make_pair(tensor, tensor, fold=fold)
    return pair, _launch.make_tiling(pair)


def _binary(plan: tuple[Any, Any], term: int) -> tuple[Any, dict[str, Any], int]:
    """The kernel, what is compiled into it, and its warps: all that distinguishes binaries for aligned pointers."""
    from taylor_cuda.kernels import _sums

    pair, tiling = plan
    constants = _sums.constants_of(pair, tiling, torch.empty(0), term, False)
    return _sums.column_sums_kernel if pair.columns else _sums.row_sums_kernel, constants, tiling.warps


@pytest.mark.parametrize(("name", "fold"), [("nhwc bf16", False), ("nchw bf16", False), ("[N, C] bf16", True)])
def test_several_terms_at_once_load_as_widely_as_one(name: str, fold: bool, tmp_path: Path) -> None:
    """Of ``"all"``: two terms, or, where samples are folded, three."""
    kernel, constants, warps = _binary(_plan(layout(name), fold), 4 if fold else 3)
    types = {"a_ptr": "bf16", "g_ptr": "bf16", "out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.count("LDG.E.128") == compiled.count("LDG") >= 2


GATES = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7), (256, 56), (512, 28), (1024, 14)]
GATES += [(2048, 7)]  # of ResNet-50, with NVlabs's placement
CUT = [(72, 56), (40, 28), (200, 14), (136, 7), (960, 7), (2040, 7)]  # what pruning to multiples of 8 may leave


def _image(*shape: int, channels_last: bool, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def _binaries(gates: list[tuple[int, int]], channels_last: bool, samples: int = 256) -> set[str]:
    images = [_image(samples, channels, side, side, channels_last=channels_last) for channels, side in gates]
    plans = [_plan(image, fold) for image in images for fold in (False, True)]
    return {str((kernel.__name__, constants, warps)) for kernel, constants, warps in (_binary(p, 0) for p in plans)}


def test_one_binary_serves_every_width() -> None:
    """For each term and type: one for channels_last, one for each of three lengths of a row for NCHW."""
    assert len(_binaries([(64, 28), (72, 28), (128, 28), (2048, 28)], True)) == 1
    everything = _binaries(GATES, True)
    assert len(everything) == 1
    assert everything == _binaries(CUT, True) == _binaries(CUT, True, samples=3)
    assert len(_binaries(GATES, False)) == 3
    assert _binaries(CUT, False) <= _binaries(GATES, False)


def test_numbers_are_no_part_of_a_binary() -> None:
    """Triton makes a binary of its own for a 1 and for multiples of 16, unless it is told not to."""
    from taylor_cuda.kernels import _sums, score_relu_backward

    names = ("column_sums_kernel", "row_sums_kernel", "finish_channels_kernel", "finish_samples_kernel")
    relus = (score_relu_backward.column_relu_kernel, score_relu_backward.row_relu_kernel)
    for kernel in (*(getattr(_sums, name) for name in names), _sums.finish_all_kernel, *relus):
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert numbers
        assert [p.name for p in numbers if not p.do_not_specialize] == []


@pytest.mark.parametrize(
    ("name", "skip"),
    [("nhwc bf16", False), ("nhwc bf16", True), ("nhwc fp32", True), ("nchw fp32", True), ("nchw bf16, 7x7", True)],
)
def test_the_relu(name: str, skip: bool, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import score_relu_backward

    _, _, dtype, load = LAYOUTS[name]
    pair, tiling = _plan(layout(name), fold=False)
    kernel = score_relu_backward.column_relu_kernel if pair.columns else score_relu_backward.row_relu_kernel
    constants = {
        **{"SKIP": skip, "ADD": False, "ACC": tl.float32, "UNIT": tiling.unit, "CONTIGUOUS": tiling.contiguous},
        **{"NESTED": pair.outer.size > 1, "BLOCK_L": tiling.block_length},
        "BLOCK_C" if pair.columns else "BLOCK_R": tiling.block_across,
    }
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = dict.fromkeys(("o_ptr", "g_ptr", "s_ptr", "gx_ptr"), element) | {"out_ptr": "fp32", "skip_out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, score_relu_backward.warps_of(tiling, skip), tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.count(load) == compiled.count("LDG") >= 2
    assert compiled.count(load.replace("LDG", "STG")) >= 1


# Layout: shape, channels_last, type, width of the loads that the documentation of batch_norm_relu promises for it.
NORMS: dict[str, tuple[tuple[int, ...], bool, torch.dtype, str]] = {
    "nhwc bf16": ((256, 64, 56, 56), True, torch.bfloat16, ".128"),
    "nhwc fp32": ((256, 256, 56, 56), True, torch.float32, ".128"),
    "nhwc bf16, 24 channels": ((64, 24, 28, 28), True, torch.bfloat16, ".128"),
    "nchw bf16": ((256, 64, 56, 56), False, torch.bfloat16, ".128"),
}

# What its kernels are compiled for in training, and how many tensors each loads and stores.
PASSES: dict[str, tuple[str, dict[str, bool], int, int]] = {
    "moments": ("moments_kernel", {}, 1, 0),
    "output": ("apply_kernel", {"RESIDUAL": True, "RELU": True}, 2, 1),
    "sums": ("gradient_sums_kernel", {"OUTPUT": True, "MASKED": True, "RELU": True}, 3, 1),
    "gradient": ("input_gradient_kernel", {"OUTPUT": False, "MASKED": False, "RELU": True}, 2, 1),
}


@pytest.mark.parametrize(
    ("name", "which"), [*(("nhwc bf16", which) for which in PASSES), *((name, "sums") for name in list(NORMS)[1:])]
)
def test_the_passes_of_batch_norm_relu(name: str, which: str, tmp_path: Path) -> None:
    from taylor_cuda.kernels import _batch_norm, batch_norm_relu

    shape, channels_last, dtype, width = NORMS[name]
    kernel_name, flags, loads, stores = PASSES[which]
    image = _image(*shape, channels_last=channels_last, dtype=dtype)
    grid = batch_norm_relu.make_grid(image, fold=kernel_name[0] != "g")
    kernel = getattr(_batch_norm, kernel_name)
    given = {"WEIGHT": True, "BIAS": True, "GROUP": grid.group, "TRAINING": True, "INNER": True}
    constants = {k: v for k, v in {**grid.constants, **given, **flags}.items() if k in kernel.arg_names}
    absent = {
        "residual_ptr": flags.get("RESIDUAL"),
        "y_ptr": flags.get("OUTPUT", True),
        "masked_ptr": flags.get("MASKED"),
    }
    constants |= {k: None for k, present in absent.items() if k in kernel.arg_names and not present}
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    images = ("x_ptr", "g_ptr", "y_ptr", "residual_ptr", "masked_ptr", "gx_ptr")
    types = {k: element if k in images else "fp32" for k in kernel.arg_names}
    compiled = compile_for_hopper(kernel, constants, types, grid.warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    per_tensor = grid.block_length * grid.block_channels // (32 * grid.warps) // grid.unit
    tiles = 2 if which == "moments" and grid.trips > 1 else 1  # the first tile is taken apart from the loop
    assert compiled.count("LDG.E" + width) >= loads * per_tensor * tiles
    assert compiled.count("STG.E" + width) == stores * per_tensor
