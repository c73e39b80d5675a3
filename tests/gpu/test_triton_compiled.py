"""Every Triton kernel compiled ahead of time for Hopper, without a GPU, as the shapes of networks configure it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import sass

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="this triton has no cuobjdump"),
]


def compile_for_hopper(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, folder: Path
) -> sass.Kernel:
    """Compile with 16-byte aligned pointers and 32-bit sizes, as the JIT does for tensors and ordinary numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    pointers = [name for name in names if name.endswith("_ptr")]
    numbers = dict.fromkeys(names, "i32") | dict.fromkeys(("momentum", "eps"), "fp32")
    signature = {
        name: "constexpr" if name in constants else "*" + types[name] if name in pointers else numbers[name]
        for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (result,) = sass.kernels_of(cubin)
    return result


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c)


# Layout: shape, strides (None: contiguous), type, and the loads that the documentation of the kernels promises for it.
SUMS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype, str]] = {
    "nhwc bf16": ((256, 64, 56, 56), _nhwc((256, 64, 56, 56)), torch.bfloat16, "LDG.E.128"),
    "nhwc fp32": ((256, 64, 56, 56), _nhwc((256, 64, 56, 56)), torch.float32, "LDG.E.128"),
    "nhwc bf16, 24 channels": ((64, 24, 28, 28), _nhwc((64, 24, 28, 28)), torch.bfloat16, "LDG.E.128"),
    "nhwc bf16, 7x7": ((256, 512, 7, 7), _nhwc((256, 512, 7, 7)), torch.bfloat16, "LDG.E.128"),
    "nhwc bf16, 13 channels": ((64, 13, 28, 28), _nhwc((64, 13, 28, 28)), torch.bfloat16, "LDG.E.U16"),
    "nhwc bf16, cropped": ((64, 64, 28, 28), (64 * 900, 1, 64 * 30, 64), torch.bfloat16, "LDG.E.128"),
    "nchw bf16": ((256, 64, 56, 56), None, torch.bfloat16, "LDG.E.128"),
    "nchw fp32": ((256, 64, 56, 56), None, torch.float32, "LDG.E.128"),
    "nchw bf16, 14x14": ((256, 256, 14, 14), None, torch.bfloat16, "LDG.E.64"),
    "nchw bf16, 7x7": ((256, 512, 7, 7), None, torch.bfloat16, "LDG.E.U16"),
    "nchw fp32, cropped": ((64, 64, 28, 28), (64 * 900, 900, 30, 1), torch.float32, "LDG.E"),
    "[N, C] bf16": ((4096, 1024), None, torch.bfloat16, "LDG.E.128"),
    "[N, L, C] bf16": ((256, 768, 197), (197 * 768, 1, 768), torch.bfloat16, "LDG.E.128"),
}


def _plan(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype, fold: bool) -> tuple[Any, Any]:
    """How a tensor of this layout is walked and tiled."""
    from taylor_cuda.kernels import _launch

    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if strides is not None:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    pair = _launch.make_pair(tensor, tensor, fold=fold)
    return pair, _launch.make_tiling(pair)


def _binary(plan: tuple[Any, Any], term: int) -> tuple[Any, dict[str, Any], int]:
    """The kernel, what is compiled into it, and its warps: all that distinguishes binaries for aligned pointers."""
    from taylor_cuda.kernels import _sums

    pair, tiling = plan
    constants = _sums.constants_of(pair, tiling, torch.empty(0), term, False)
    return _sums.column_sums_kernel if pair.columns else _sums.row_sums_kernel, constants, tiling.warps


# Terms of "sample" and "batch", and those of "all" at once, which [N, C] takes folded.
@pytest.mark.parametrize(("name", "term"), [*((name, 0) for name in SUMS), ("nhwc bf16", 3), ("nchw bf16", 3)])
def test_partial_sums(name: str, term: int, tmp_path: Path) -> None:
    shape, strides, dtype, load = SUMS[name]
    kernel, constants, warps = _binary(_plan(shape, strides, dtype, fold=False), term)
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = {"a_ptr": element, "g_ptr": element, "out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.registers <= 255
    assert compiled.count(load) == compiled.count("LDG") >= 2


def test_three_terms_at_once(tmp_path: Path) -> None:
    kernel, constants, warps = _binary(_plan((4096, 1024), None, torch.bfloat16, fold=True), 4)
    types = {"a_ptr": "bf16", "g_ptr": "bf16", "out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.count("LDG.E.128") == compiled.count("LDG") >= 2


GATES = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7), (256, 56), (512, 28), (1024, 14)]
GATES += [(2048, 7)]  # of ResNet-50, with NVlabs's placement
CUT = [(72, 56), (40, 28), (200, 14), (136, 7), (960, 7), (2040, 7)]  # what pruning to multiples of 8 may leave


def _binaries(gates: list[tuple[int, int]], channels_last: bool, samples: int = 256) -> set[str]:
    shapes = [(samples, channels, side, side) for channels, side in gates]
    plans = [
        _plan(shape, _nhwc(shape) if channels_last else None, torch.bfloat16, fold)
        for shape in shapes
        for fold in (False, True)
    ]
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
    from taylor_cuda.kernels import _sums

    names = ("column_sums_kernel", "row_sums_kernel", "finish_channels_kernel", "finish_samples_kernel")
    for kernel in (*(getattr(_sums, name) for name in names), _sums.finish_all_kernel):
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
        assert numbers
        assert [p.name for p in numbers if not p.do_not_specialize] == []


@pytest.mark.parametrize("three", [False, True])
def test_the_finish_of_all(three: bool, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _sums

    constants = {"THREE": three, "ACC": tl.float32, "BLOCK_N": 128 if three else 16, "BLOCK_S": 1 if three else 8}
    types = {"t_ptr": "fp32", "out_ptr": "fp32"}
    compiled = compile_for_hopper(_sums.finish_all_kernel, {**constants, "BLOCK_C": 32}, types, 8, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)


@pytest.mark.parametrize(("post", "splits"), [(0, 1), (1, 8), (2, 32)])
def test_the_finish_over_samples(post: int, splits: int, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _sums

    constants = {"MAP": post, "SQUARE_TOTAL": post == 0, "ADD": False, "ACC": tl.float32}
    blocks = {"BLOCK_N": 128 // splits, "BLOCK_S": splits, "BLOCK_C": 32}
    types = {"t_ptr": "fp32", "out_ptr": "fp32"}
    compiled = compile_for_hopper(_sums.finish_channels_kernel, {**constants, **blocks}, types, 8, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)


@pytest.mark.parametrize("add", [False, True])
def test_the_finish_of_samples(add: bool, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _sums

    constants = {"ADD": add, "ACC": tl.float32, "BLOCK": 256}
    compiled = compile_for_hopper(
        _sums.finish_samples_kernel, constants, {"t_ptr": "fp32", "out_ptr": "fp32"}, 4, tmp_path
    )
    assert (compiled.spills, compiled.stack) == (0, 0)


@pytest.mark.parametrize(
    ("name", "skip"),
    [("nhwc bf16", False), ("nhwc bf16", True), ("nhwc fp32", True), ("nchw fp32", True), ("nchw bf16, 7x7", True)],
)
def test_the_relu(name: str, skip: bool, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _launch, score_relu_backward

    shape, strides, dtype, load = SUMS[name]
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if strides is not None:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    pair = _launch.make_pair(tensor, tensor, fold=False)
    tiling = _launch.make_tiling(pair)
    kernel = score_relu_backward.column_relu_kernel if pair.columns else score_relu_backward.row_relu_kernel
    constants = {
        **{"SKIP": skip, "ADD": False, "ACC": tl.float32, "UNIT": tiling.unit, "CONTIGUOUS": tiling.contiguous},
        **{"NESTED": pair.outer.size > 1, "BLOCK_L": tiling.block_length, "TRIPS": tiling.trips},
        "BLOCK_C" if pair.columns else "BLOCK_R": tiling.block_across,
    }
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = dict.fromkeys(("o_ptr", "g_ptr", "s_ptr", "gx_ptr"), element) | {"out_ptr": "fp32", "skip_out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, tiling.warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.count(load) == compiled.count("LDG") >= 2
    assert compiled.count(load.replace("LDG", "STG")) >= 1


NORMS: dict[str, tuple[tuple[int, ...], bool, torch.dtype, str]] = {
    "nhwc bf16": ((256, 64, 56, 56), True, torch.bfloat16, ".128"),
    "nhwc bf16, 7x7": ((256, 512, 7, 7), True, torch.bfloat16, ".128"),
    "nhwc bf16, 24 channels": ((64, 24, 28, 28), True, torch.bfloat16, ".128"),
    "nhwc fp32": ((256, 256, 56, 56), True, torch.float32, ".128"),
    "nhwc bf16, 13 channels": ((64, 13, 28, 28), True, torch.bfloat16, ".U16"),
    "nchw bf16": ((256, 64, 56, 56), False, torch.bfloat16, ".128"),
    "nchw bf16, 7x7": ((256, 512, 7, 7), False, torch.bfloat16, ".U16"),
}


# What each kernel of batch_norm_relu is compiled for beside its grid, in training; how many tensors it loads, stores.
PASSES: dict[str, tuple[str, dict[str, bool], int, int]] = {
    "moments": ("moments_kernel", {}, 1, 0),
    "output": ("apply_kernel", {"RESIDUAL": False, "RELU": True}, 1, 1),
    "output, residual": ("apply_kernel", {"RESIDUAL": True, "RELU": True}, 2, 1),
    "sums": ("gradient_sums_kernel", {"OUTPUT": False, "MASKED": False, "RELU": True}, 2, 0),
    "sums, residual": ("gradient_sums_kernel", {"OUTPUT": True, "MASKED": True, "RELU": True}, 3, 1),
    "gradient": ("input_gradient_kernel", {"OUTPUT": False, "MASKED": False, "RELU": True}, 2, 1),
    "gradient, residual": ("input_gradient_kernel", {"OUTPUT": False, "MASKED": False, "RELU": False}, 2, 1),
}


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", NORMS)
def test_the_passes_of_batch_norm_relu(name: str, which: str, tmp_path: Path) -> None:
    from taylor_cuda.kernels import _batch_norm, batch_norm_relu

    shape, channels_last, dtype, width = NORMS[name]
    kernel_name, flags, loads, stores = PASSES[which]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grid = batch_norm_relu.make_grid(
        torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format), fold=kernel_name[0] != "g"
    )
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


def test_the_finishes_of_batch_norm_relu(tmp_path: Path) -> None:
    from taylor_cuda.kernels import _batch_norm

    for kernel, constants in (
        (_batch_norm.statistics_kernel, {"TRAINING": True, "RUNNING": True, "BLOCK_P": 1024, "BLOCK_C": 4}),
        (_batch_norm.gates_kernel, {"PER_SAMPLE": True, "TOTAL": False, "BLOCK_N": 128, "BLOCK_S": 4, "BLOCK_C": 4}),
        (_batch_norm.gates_kernel, {"PER_SAMPLE": False, "TOTAL": True, "BLOCK_N": 512, "BLOCK_S": 1, "BLOCK_C": 4}),
    ):
        given = {k: v for k, v in {**constants, "WEIGHT": True, "BIAS": True}.items() if k in kernel.arg_names}
        compiled = compile_for_hopper(kernel, given, dict.fromkeys(kernel.arg_names, "fp32"), 8, tmp_path)
        assert (compiled.spills, compiled.stack) == (0, 0)
