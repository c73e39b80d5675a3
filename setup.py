"""Builds the native parts and maps the folders to packages. Everything else is in pyproject.toml.

TAYLOR_CUDA_BUILD chooses what is built: ``auto`` the C++ parts, and the CUDA part where nvcc and a CUDA build of torch
are there; ``cpu`` the C++ parts only; ``cuda`` all of it; ``none`` nothing. A request that can't be met raises and
names what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
FOLDERS = (
    *("ops", "graph", "importance", "planning", "surgery", "study", "integrations", "train", "train.recipes"),
    *("report", "cli"),
)
# beside the package's folder, installed in it
BESIDE = ("kernels", "bench", "bench.suites", "bench.coverage", "bench.frontier")
PACKAGES = ["taylor_cuda", *(f"taylor_cuda.{folder}" for folder in (*FOLDERS, *BESIDE))]
TORCH_LIBRARIES = ("_C", "_C_cuda")  # loaded by torch, not by Python: no Python ABI in their names
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DTORCH_STABLE_ONLY"]  # torch 2.11 and all later ones
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


def build_mode() -> str:
    """The requested build mode."""
    mode = os.environ.get("TAYLOR_CUDA_BUILD", "auto")
    if mode not in MODES:
        raise RuntimeError(f"TAYLOR_CUDA_BUILD={mode!r}: wanted one of {', '.join(MODES)}")
    return mode


def sources(folder: str, suffix: str) -> list[str]:
    """The source files of one folder, relative to the root as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(f"*{suffix}"))


def missing_for_cpp() -> list[str]:
    """What the C++ parts lack on this machine."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = shutil.which(compiler)
    return [] if found else [f"a C++ compiler ({compiler!r} is not on the PATH; install g++ or clang++, or set CXX)"]


def cuda_home() -> Path | None:
    """The CUDA toolkit: a folder that holds both nvcc and the runtime's headers.

    nvcc on the PATH may be a script that lies elsewhere, so its parent folder proves nothing: it is asked for its own
    root.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False)
        candidates += re.findall(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, flags=re.MULTILINE)
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if candidate:
            home = Path(candidate.strip()).resolve()
            if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
                return home
    return None


def missing_for_cuda(home: Path | None) -> list[str]:
    """What the CUDA part lacks on this machine. A visible GPU is not among it."""
    import torch

    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (torch {torch.__version__} is for the CPU)")
    if home is None:
        missing.append("the CUDA toolkit (no folder with bin/nvcc and include/cuda_runtime.h; set CUDA_HOME)")
    elif torch.version.cuda is not None:
        answer = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True)
        release = re.search(r"release (\d+)\.", answer.stdout)
        if release is None or release[1] != torch.version.cuda.split(".")[0]:
            missing.append(f"a CUDA toolkit of torch's major version {torch.version.cuda} ({home} is another)")
    return missing


def choose_architectures() -> None:
    """Set the architectures where torch could not see them on a GPU. Flags written here would overrule the variable."""
    import torch

    if "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.device_count() == 0:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES
        print(f"TORCH_CUDA_ARCH_LIST is not set and no GPU is visible: building for {DEFAULT_ARCHITECTURES}")


def cpu_extension() -> Extension:
    """csrc/cpu -> taylor_cuda/_C.so, on torch's stable ABI."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "taylor_cuda._C",
        [*sources("csrc", ".cpp"), *sources("csrc/cpu", ".cpp")],
        include_dirs=[str(ROOT / "csrc"), *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu"],
        extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *STABLE_ABI]},
        language="c++",
    )


def cuda_extension(home: Path) -> Extension:
    """csrc/cuda -> taylor_cuda/_C_cuda.so, on torch's stable ABI; with the CUDA runtime linked in where it can be."""
    from torch.utils.cpp_extension import include_paths, library_paths

    libraries = library_paths(device_type="cuda")
    static = any((Path(folder) / "libcudart_static.a").is_file() for folder in [home / "lib64", *libraries])
    flags = ["-DUSE_CUDA", *STABLE_ABI]
    return Extension(
        "taylor_cuda._C_cuda",
        sources("csrc/cuda", ".cu"),
        include_dirs=[str(ROOT / "csrc"), *include_paths(device_type="cuda")],
        library_dirs=[*libraries, str(home / "lib64")],
        libraries=[
            "torch",
            "torch_cpu",
            "torch_cuda",
            *(["cudart_static", "dl", "rt", "pthread"] if static else ["cudart"]),
        ],
        extra_compile_args={
            "cxx": ["-O3", "-fvisibility=hidden", *flags],
            "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo", *flags],
        },
        language="c++",
    )


def planner_extension() -> Extension:
    """csrc/planner -> taylor_cuda._planner: plain C++17, no torch."""
    import pybind11

    return Extension(
        "taylor_cuda._planner",
        sources("csrc/planner", ".cpp"),
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"]},
        language="c++",
    )


def extensions(mode: str) -> list[Extension]:
    """The native parts that the mode asks for and this machine can build."""
    if mode == "none":
        return []
    missing = missing_for_cpp()
    home = None
    if mode != "cpu":
        home = cuda_home()
        missing_cuda = missing_for_cuda(home)
        if mode == "cuda":
            missing += missing_cuda
        elif missing_cuda:
            print("taylor_cuda: building without CUDA, for want of " + " and ".join(missing_cuda))
            home = None
    if missing:
        raise RuntimeError(
            f"TAYLOR_CUDA_BUILD={mode} needs "
            + " and ".join(missing)
            + "; TAYLOR_CUDA_BUILD=none installs without native code"
        )
    parts = [cpu_extension()]
    if sources("csrc/planner", ".cpp"):
        parts.append(planner_extension())
    if home is not None and sources("csrc/cuda", ".cu"):
        os.environ["CUDA_HOME"] = str(home)
        choose_architectures()
        parts.append(cuda_extension(home))
    return parts


def build_command() -> type[build_ext]:
    """Torch's build_ext (ninja, nvcc), with plain names for the libraries that torch loads."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc, unused-ignore]
        def finalize_options(self) -> None:
            given = self.build_temp
            super().finalize_options()
            if self.inplace and not given:
                self.build_temp = str(
                    ROOT / "build" / "native"
                )  # kept, so that an editable install rebuilds what changed

        def get_ext_filename(self, ext_name: str) -> str:
            if ext_name.split(".")[-1] in TORCH_LIBRARIES:
                return os.path.join(*ext_name.split(".")) + ".so"
            return str(super().get_ext_filename(ext_name))

    return Build


def native() -> dict[str, Any]:
    """The arguments of setup() that concern native code. Metadata needs none of it, so needs no torch either."""
    mode = build_mode()
    builds = any(command in sys.argv for command in ("build", "build_ext", "bdist_wheel", "editable_wheel", "install"))
    parts = extensions(mode) if builds else []
    return {"ext_modules": parts, "cmdclass": {"build_ext": build_command()}} if parts else {}


setup(
    packages=PACKAGES,
    package_dir={"taylor_cuda": "taylor_cuda", "taylor_cuda.kernels": "kernels", "taylor_cuda.bench": "bench"},
    package_data={"taylor_cuda": ["py.typed", "*.pyi"], "taylor_cuda.train.recipes": ["*.toml"]},
    **native(),
)
