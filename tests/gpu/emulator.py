"""The CUDA sources compiled with the host's compiler, to run on CPU tensors: emulation/cuda_runtime.h plays the GPU.

Three things are replaced in a copy of the sources: launches (``<<<...>>>`` is no C++), the namespace of the ops, and
the calls that ask torch for a CUDA stream or device. Everything else is what nvcc compiles: index arithmetic, shared
memory, shuffles, barriers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = re.compile(r"(\w+(?:<[^;{}]*?>)?)<<<([^;]*?), ([^;]*?), 0, stream>>>\(([^;]*?)\);")
RENAMED = {
    "aoti_torch_get_current_cuda_stream": "emulated_current_stream",
    "aoti_torch_create_device_guard": "emulated_create_guard",
    "aoti_torch_delete_device_guard": "emulated_delete_guard",
    "torch_c10_cuda_check_msg": "emulated_check",
    "torch_c10_cuda_free_error_msg": "emulated_free",
    "aoti_torch_device_type_cuda": "aoti_torch_device_type_cpu",
}
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]


def compiler() -> str | None:
    """The host's C++ compiler."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def torch_folder() -> Path:
    """Where torch's headers and libraries are."""
    return Path(torch.__file__).parent


def write_sources(folder: Path) -> list[Path]:
    """The copy of csrc that a host compiler takes; returns the files to compile."""
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("cpu", "planner", "*.cpp"))
    for path in (folder / "cuda").iterdir():
        text = LAUNCH.sub(r"emulate::launch(\2, \3, [&] { \1(\4); });", path.read_text())
        if "<<<" in text:
            raise RuntimeError(f"{path.name}: a launch that the emulation does not know")
        path.write_text(text.replace("(taylor_cuda_native, CUDA,", "(taylor_cuda_emulated, CPU,"))
    return sorted((folder / "cuda").glob("*.cu"))


def _compile(path: Path) -> Path:
    target = path.with_suffix(".o")
    names = [f"-D{name}={other}" for name, other in RENAMED.items()]
    folders = ["-I", str(Path(__file__).parent / "emulation"), "-isystem", str(torch_folder() / "include")]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-fvisibility=hidden",
        "-w",
        *STABLE_ABI,
        *names,
        *folders,
    ]
    done = subprocess.run(
        [str(compiler()), *flags, "-x", "c++", "-c", str(path), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{path.name}:\n{done.stderr[-4000:]}")
    return target


def build(folder: Path) -> Path:
    """Compile and link the emulated ops in a folder that does not exist yet."""
    files = [*write_sources(folder), Path(__file__).parent / "emulation" / "shims.cpp"]
    shims = folder / "shims.cpp"
    shutil.copy(files[-1], shims)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(_compile, [*files[:-1], shims]))
    library = folder / "emulated.so"
    libraries = ["-L", str(torch_folder() / "lib"), "-ltorch", "-ltorch_cpu"]
    subprocess.run([str(compiler()), "-shared", *map(str, objects), *libraries, "-o", str(library)], check=True)
    return library


def schemas() -> list[str]:
    """The schemas of csrc/registration.cpp."""
    text = re.sub(r'"\s*\n\s*"', "", (ROOT / "csrc" / "registration.cpp").read_text())  # literals in a row are one
    return [schema.replace('\\"', '"') for schema in re.findall(r'm\.def\(\s*"((?:[^"\\]|\\.)*)"\)', text)]
