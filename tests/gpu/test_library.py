"""The built _C_cuda.so: it loads without a GPU, brings every op, and needs nothing of torch but its C interface."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taylor_cuda

LIBRARY = Path(taylor_cuda.__file__).parent / "_C_cuda.so"
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch has no libtorch_cuda"),
    pytest.mark.skipif(not LIBRARY.is_file(), reason="_C_cuda.so was not built (no nvcc, or TAYLOR_CUDA_BUILD)"),
]

LOAD = """
import ctypes, os, sys, torch
torch.ops.load_library(sys.argv[1].replace("_C_cuda.so", "_C.so"))
torch.ops.load_library(sys.argv[1])
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)
names = ("channel_importance", "channel_sums", "accumulate_channel_sums", "weight_importance", "score_relu_backward")
found = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in names if not found("taylor_cuda_native::" + name, "CUDA")]
sys.exit("no CUDA kernel for " + ", ".join(missing) if missing else 0)
"""


def test_loads_and_registers_every_op() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, str(LIBRARY)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on the PATH")
def test_needs_only_the_stable_interface_of_torch() -> None:
    done = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    needed = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if re.match(r"_ZNK?(2at|3c10|5torch)|Py", name)] == []
