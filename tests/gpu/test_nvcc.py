"""Every CUDA source compiled by nvcc for Hopper, without a GPU: no spills, 16-byte loads where the sources say so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.gpu import emulator, sass

# Kernels with 16-byte loads: columns (at one stride, at several), rows, packed rows of four types; six pairs of types.
WIDE_KERNELS = {"accumulate_channel_sums": 0, "channel_importance": 36, "channel_sums": 16, "weight_importance": 6}
WIDE_KERNELS["score_relu_backward"] = 24  # columns, rows, packed rows of four types; each with a skip and without
WIDE_STORES = re.compile(r"_relu_kernelI\w+?Li[248]E")
SOURCES = sorted((emulator.ROOT / "csrc" / "cuda").glob("*.cu"))
WIDE = re.compile(r"(column_sums|row_sums|packed_sums|_relu)_kernelI\w+?Li[248]E|\d(weights)_kernelI")


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the PATH, or where it is installed by default."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return next(
        (path for home in homes if home and (path := shutil.which("nvcc", path=f"{home}/bin"))), shutil.which("nvcc")
    )


@pytest.mark.skipif(nvcc() is None, reason="no nvcc (looked in CUDA_HOME, /usr/local/cuda and on the PATH)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    folders = ["-I", str(emulator.ROOT / "csrc"), "-isystem", str(emulator.torch_folder() / "include")]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90", "-Xptxas", "-v", *emulator.STABLE_ABI]
    command = [str(nvcc()), *flags, *folders, "-cubin", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = re.findall(
        r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr
    )
    assert report
    assert [name for name, *numbers in report if any(map(int, numbers))] == []
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == len(report)
    assert max(registers) <= 128  # two blocks of 256 threads on a multiprocessor at the least
    if sass.cuobjdump() is not None:
        kernels = sass.kernels_of(cubin)
        assert len(kernels) == len(report)
        wide = [kernel for kernel in kernels if WIDE.search(kernel.name)]
        assert len(wide) == WIDE_KERNELS.get(source.stem, 0)
        assert [kernel.name for kernel in wide if kernel.count("LDG.E.128") < 2] == []
        assert [k.name for k in wide if WIDE_STORES.search(k.name) and k.count("STG.E.128") < 2] == []
