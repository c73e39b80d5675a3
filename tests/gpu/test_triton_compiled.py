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
    signature = {
        name: "constexpr" if name in constants else "*" + types[name] if name in pointers else "i32" for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
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
}


@pytest.mark.parametrize("name", SUMS)
def test_partial_sums(name: str, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _launch, _sums

    shape, strides, dtype, load = SUMS[name]
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if strides is not None:
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    pair = _launch.make_pair(tensor, tensor, fold=False)
    tiling = _launch.make_tiling(pair)
    kernel = _sums.column_sums_kernel if pair.columns else _sums.row_sums_kernel
    constants = {
        **{"MAP": _sums.PRODUCT, "ADD": False, "ACC": tl.float32, "UNIT": tiling.unit, "CONTIGUOUS": tiling.contiguous},
        **{"NESTED": pair.outer.size > 1, "BLOCK_L": tiling.block_length, "TRIPS": tiling.trips},
        "BLOCK_C" if pair.columns else "BLOCK_R": tiling.block_across,
    }
    element = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = {"a_ptr": element, "g_ptr": element, "out_ptr": "fp32"}
    compiled = compile_for_hopper(kernel, constants, types, tiling.warps, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
    assert compiled.registers <= 255
    assert compiled.count(load) == compiled.count("LDG") >= 2


@pytest.mark.parametrize(("post", "splits"), [(0, 1), (1, 4), (2, 32)])
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
