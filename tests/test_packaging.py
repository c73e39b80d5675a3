"""Installing: what is declared, what a wheel and a source archive hold, and build requests that can't be met."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = ("kernels", "bench")  # folders of the root that are installed as packages of taylor_cuda


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what a build leaves, so that builds here disturb nothing."""
    target = tmp_path_factory.mktemp("source") / "project"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "runs", "results", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def build(
    source: Path, out: Path, *command: str, mode: str = "none", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command, "--dist-dir", str(out)],
        cwd=source,
        env={**os.environ, "TAYLOR_CUDA_BUILD": mode, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in requirements}


def test_the_five_packages_are_declared(project: dict) -> None:
    assert {"torch", "triton"} <= names(project["project"]["dependencies"])
    assert {"torch", "ninja", "pybind11"} <= names(project["build-system"]["requires"])
    assert "pytest-benchmark" in names(project["project"]["optional-dependencies"]["test"])
    (triton,) = [entry for entry in project["project"]["dependencies"] if entry.startswith("triton")]
    assert "Linux" in triton


def test_wheel_without_native_code_holds_every_python_file(source: Path, tmp_path: Path) -> None:
    done = build(source, tmp_path, "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "taylor_cuda").rglob("*.py")}
    expected |= {f"taylor_cuda/{path.relative_to(ROOT)}" for name in MAPPED for path in (ROOT / name).rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "taylor_cuda").rglob("*.toml")}
    assert expected | {"taylor_cuda/py.typed"} <= held
    assert not [name for name in held if name.startswith(("tests/", "bench/", "kernels/"))]
    assert not [name for name in held if name.endswith((".jsonl", ".png"))]


def test_source_archive_holds_everything_a_build_needs(source: Path, tmp_path: Path) -> None:
    done = build(source, tmp_path, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    native = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    python = {str(path.relative_to(ROOT)) for name in MAPPED for path in (ROOT / name).rglob("*.py")}
    python |= {str(path.relative_to(ROOT)) for path in (ROOT / "taylor_cuda").rglob("*.toml")}
    assert native | python | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "taylor_cuda/py.typed"} <= held


def test_an_unknown_build_mode_is_refused(source: Path, tmp_path: Path) -> None:
    done = build(source, tmp_path, "bdist_wheel", mode="gpu")
    assert done.returncode != 0
    assert "wanted one of auto, none, cpu, cuda" in done.stderr


def test_native_code_without_a_compiler_is_refused(source: Path, tmp_path: Path) -> None:
    done = build(source, tmp_path, "bdist_wheel", mode="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "a C++ compiler ('no-such-compiler' is not on the PATH" in done.stderr
    assert "TAYLOR_CUDA_BUILD=none" in done.stderr


def test_cuda_without_its_toolkit_is_refused(source: Path, tmp_path: Path) -> None:
    """With a torch that was built for the CPU, that is named as well."""
    code = (
        "import runpy, shutil, sys, setuptools, pathlib\n"
        "which = shutil.which\n"
        "shutil.which = lambda name, *rest, **options: None if name == 'nvcc' else which(name, *rest, **options)\n"
        "pathlib.Path.is_file = lambda self: 'cuda' not in str(self) and self.exists()\n"
        "sys.argv = ['setup.py', 'bdist_wheel']\n"
        "import torch; torch.version.cuda = None\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**environment, "TAYLOR_CUDA_BUILD": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "a CUDA build of torch" in done.stderr
    assert "the CUDA toolkit" in done.stderr
