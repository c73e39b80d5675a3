"""Cases that several processes go through together."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PASSED = "passed"

Cases = Callable[[int, Path], Mapping[str, Callable[[], None]]]
"""``(rank, folder) -> {name: case}``, a function of a module, which a process that starts can import."""


def on_ranks(cases: Cases, folder: Path, seconds: float, ranks: int = 2) -> None:
    """Go through all cases on ``ranks`` gloo ranks, which end when they are done, after a failure or ``seconds``."""
    context = mp.spawn(_go_through, (cases, ranks, folder), nprocs=ranks, join=False)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and not context.join(timeout=1):
            if any(not path.read_text().startswith(PASSED) for path in folder.glob("*.txt")):
                break
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        (folder / "died.txt").write_text(str(error))
    for process in context.processes:
        process.kill()


def _go_through(rank: int, cases: Cases, ranks: int, folder: Path) -> None:
    """Run all cases in this process, because starting one takes seconds, and write what became of each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for name, case in cases(rank, folder).items():
        started = time.perf_counter()
        try:
            case()
            result = ""
        except Exception:
            result = traceback.format_exc()
        _write(folder / f"{name}.{rank}.txt", result or f"{PASSED} in {time.perf_counter() - started:.1f} s")
        if result:
            break  # the other ranks may wait where this one no longer comes
        dist.barrier()
    dist.destroy_process_group()


def _write(path: Path, text: str) -> None:
    """At once: whoever reads it finds all of it."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def check_passed(case: str, rank: int, folder: Path) -> None:
    """Assert that a case passed on a rank; otherwise show all outcomes, the earliest first."""
    results = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"), key=lambda p: p.stat().st_mtime)}
    assert results.get(f"{case}.{rank}", "").startswith(PASSED), "\n".join(f"{k}: {v}" for k, v in results.items())
