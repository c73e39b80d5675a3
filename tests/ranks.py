"""Cases that two processes go through together."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PASSED = "passed"


def go_through(cases: Mapping[str, Callable[[], None]], rank: int, folder: str) -> None:
    """Run all cases in this process, because starting one takes seconds, and write what became of each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, case in cases.items():
        started = time.perf_counter()
        try:
            case()
            result = ""
        except Exception:
            result = traceback.format_exc()
        Path(folder, f"{name}.{rank}.txt").write_text(result or f"{PASSED} in {time.perf_counter() - started:.1f} s")
        if result:
            break  # the other rank may wait where this one no longer comes
        dist.barrier()
    dist.destroy_process_group()


def on_two_ranks(work: Callable[[int, str], None], folder: Path, seconds: float) -> None:
    """Start ``work(rank, folder)`` twice, and end both when they are done, when a case failed, or after ``seconds``."""
    context = mp.spawn(work, (str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and not context.join(timeout=1):
            if any(not path.read_text().startswith(PASSED) for path in folder.glob("*.txt")):
                break
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        (folder / "died.txt").write_text(str(error))
    for process in context.processes:
        process.kill()


def check_passed(case: str, rank: int, folder: Path) -> None:
    """Assert that a case passed on a rank; otherwise show all outcomes, the earliest first."""
    results = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"), key=lambda p: p.stat().st_mtime)}
    assert results.get(f"{case}.{rank}", "").startswith(PASSED), "\n".join(f"{k}: {v}" for k, v in results.items())
