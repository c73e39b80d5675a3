"""The Triton kernels of masked_conv2d without a GPU: arithmetic in the interpreter, and what they compile to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import conv_cases, conv_launches, triton_launches
from tests.gpu.conv_launches import Conv
from tests.gpu.emulator import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
compiled_only = pytest.mark.skipif(
    triton_launches.toolchain() is None,
    reason="nothing is compiled: TRITON_INTERPRET=1, or this triton has no cuobjdump",
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong, by case: all of them run in one process."""
    file = tmp_path_factory.mktemp("interpreted") / "problems.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.conv_cases", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, list[str]] = json.loads(file.read_text())
    return result


@pytest.mark.parametrize("name", [*(case.name for case in conv_cases.EVERY), *conv_cases.MORE, "skips"])
def test_matches_float64(problems: dict[str, list[str]], name: str) -> None:
    assert problems[name] == []


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in conv_cases.EVERY]
    assert len(set(names)) == len(names)


def test_what_the_kernels_lack_is_refused() -> None:
    from taylor_cuda.kernels.masked_conv2d import masked_conv2d_forward

    common = (None, None, [1, 1], [0, 0], [1, 1], 1, False, None, False)
    x, weight = torch.ones(1, 2, 3, 3, dtype=torch.float64), torch.ones(2, 2, 1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64: these kernels"):
        masked_conv2d_forward(x, weight, None, *common)
    with pytest.raises(TypeError, match=r"weight is torch\.float64 and x is torch\.float32"):
        masked_conv2d_forward(x.float(), weight, None, *common)


def _launches(*convs: Conv) -> list[triton_launches.Launch]:
    from taylor_cuda.kernels import masked_conv2d as kernels

    def call() -> None:
        conv_launches.forward(kernels.masked_conv2d_forward, convs)
        conv_launches.backward(kernels.masked_conv2d_backward, convs)

    return triton_launches.record(call)


def _compiled(launch: triton_launches.Launch, folder: Path) -> Any:
    return triton_launches.compile_launch(launch, "sm_90", folder)[0]


@pytest.mark.parametrize(
    "conv",
    [Conv(256, 256, 14, keep="packed"), Conv(64, 64, 56, keep="packed", fused=True), Conv(512, 512, 7)],
    ids=["256, packed", "64, packed, fused", "512, 7x7"],
)
@compiled_only
def test_tensor_cores_are_fed_by_asynchronous_copies_of_16_bytes(conv: Conv, tmp_path: Path) -> None:
    products = [x for x in _launches(conv) if x.kernel.__name__ in ("conv_kernel", "weight_gradient_kernel")]
    assert len(products) == 3
    for launch in products:
        kernel = _compiled(launch, tmp_path)
        assert (kernel.spills, kernel.stack) == (0, 0), launch.name
        assert kernel.count("HGMMA") >= 4, launch.name
        assert kernel.count("LDGSTS") == kernel.wide("LDGSTS") >= 12, (
            launch.name
        )  # of both factors, ahead of the loop too
        assert kernel.wide("STG") >= 4, launch.name


@pytest.mark.parametrize("conv", [Conv(256, 256, 14), Conv(96, 96, 28, groups=96)], ids=["256", "depthwise"])
def test_one_binary_serves_every_packed_width(conv: Conv) -> None:
    """Of widths in multiples of 8: as many as one width launches."""
    one = len(set(_launches(conv_launches.pruned(conv)[0])))
    assert len(set(_launches(*conv_launches.pruned(conv)))) == one


def test_a_mask_is_no_part_of_a_binary() -> None:
    """Of a dense layout nothing is told to a kernel but pointers and the shape."""
    from taylor_cuda.kernels import _conv, _conv_depthwise, _conv_lists

    for module in (_conv, _conv_depthwise, _conv_lists):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
                assert numbers
                assert [p.name for p in numbers if not p.do_not_specialize] == []


@pytest.mark.parametrize("item_size", [2, 4])
def test_tiles_fit_a_multiprocessor(item_size: int) -> None:
    """Shared memory of both factors in all stages, accumulators in registers, rows that a tensor core takes."""
    from taylor_cuda.kernels import _conv_tiles as tiles

    widths, pixels = (1, 3, 8, 17, 32, 64, 100, 128, 512, 2048), (1, 49, 12544, 50176, 802816)
    made = [
        tile
        for outputs in widths
        for inputs in widths
        for taps in (1, 9, 49)
        for unit in (1, 2, 4, 16 // item_size)
        for tile in (
            *(tiles.conv_tile(p, outputs, inputs, taps, item_size, unit, f) for p in pixels for f in (True, False)),
            tiles.weight_tile(outputs, inputs, taps, item_size, unit),
        )
    ]
    for tile in set(made):
        assert tile.stages * (tile.m + tile.n) * tile.k * item_size <= 160 * 1024, tile
        assert tile.m * tile.n // (32 * tile.warps) <= 128, tile
        assert tile.m % 16 == 0, tile
        assert item_size > 2 or tile.m >= 16 * tile.warps, tile


@pytest.mark.parametrize(("tiles", "pixels", "block"), [(1, 802816, 64), (144, 12544, 64), (3, 100, 16), (600, 7, 64)])
def test_splits_cover_every_pixel_once(tiles: int, pixels: int, block: int) -> None:
    from taylor_cuda.kernels import _conv_tiles

    splits, trips = _conv_tiles.splits_of(tiles, pixels, block)
    assert (splits - 1) * trips * block < pixels <= splits * trips * block
    assert splits <= _conv_tiles.MOST_SPLITS
