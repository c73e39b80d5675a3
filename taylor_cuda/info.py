"""``python -m taylor_cuda.info``: versions, what was built, and which backend serves each op."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import taylor_cuda
from taylor_cuda.ops import backends
from taylor_cuda.planning import native_planner
from taylor_cuda.text import table


def report() -> str:
    """What is installed, as text."""
    built = sorted(path.name for path in Path(taylor_cuda.__file__).parent.glob("_*.so"))
    facts = [
        ("taylor_cuda", taylor_cuda.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("GPUs", ", ".join(_gpus()) or "none visible"),
        ("threads", torch.get_num_threads()),
        ("built", ", ".join(built) or "nothing (TAYLOR_CUDA_BUILD=none?)"),
        ("planner", "compiled" if native_planner() else "Python (slower, the same plans)"),
        ("asked for", backends.asked() or "no backend in particular"),
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = [(op, *(", ".join(backends.available(op, device)) for device in devices)) for op in backends.OPS]
    header = ("op", *(f"backends on {device}, first one runs" for device in devices))
    return table(("", "version"), facts) + "\n\n" + table(header, rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
