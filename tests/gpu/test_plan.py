"""Which thread reads what, for shapes too large to run here: the planning headers of csrc/cuda, walked on the CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.gpu import emulator


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler on the PATH")
@pytest.mark.parametrize("walk", ["plan_coverage", "mapped_coverage"])
def test_every_element_and_every_sum_has_one_thread(walk: str, tmp_path: Path) -> None:
    program = tmp_path / walk
    source = Path(__file__).parent / "emulation" / f"{walk}.cpp"
    folders = ["-I", str(emulator.ROOT / "csrc"), "-isystem", str(emulator.torch_folder() / "include")]
    flags = ["-std=c++20", "-O2", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", *emulator.STABLE_ABI]
    build = [str(emulator.compiler()), *flags, *folders, str(source), "-o", str(program)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    walked = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    problems = [line for line in walked.stdout.splitlines() if not line.startswith("#")]
    assert (walked.returncode, problems[:20]) == (0, [])
