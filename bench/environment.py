"""What was measured, on what, with what: the part of a row that is the same for a whole run."""

from __future__ import annotations

import platform
import subprocess
import uuid
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
"""The source tree, where this is one: its pyproject.toml lies there. Otherwise the folder of installed packages."""

IN_SOURCE_TREE = (ROOT / "pyproject.toml").is_file()


def environment(device: str) -> dict[str, Any]:
    """The record of this run on ``"cpu"`` or ``"cuda"``; what can't be found out is ``None``."""
    commit, dirty = repository_state()
    return {
        "device": device,
        "device_name": device_name(device),
        "run_id": uuid.uuid4().hex[:12],
        "commit": commit,
        "dirty": dirty,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if device == "cuda" else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cpu_name": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """The name of the processor or of the GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's own name for itself, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory; 32 MiB where the machine doesn't say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 << 20
    return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)


def repository_state() -> tuple[str | None, bool | None]:
    """The commit, and whether the tree differs from it (the rows themselves don't count); ``None`` once installed."""
    if not IN_SOURCE_TREE:
        return None, None
    commit = _run("git", "rev-parse", "HEAD")
    status = _run("git", "status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return commit, None if status is None else bool(status)


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _driver() -> str | None:
    found = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
