"""Every Triton kernel compiled ahead of time for Ampere and Hopper, without a GPU, as shapes of networks launch it."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import pytest

from tests.gpu import resources, triton_launches
from tests.gpu.triton_launches import (
    LAYOUTS,
    all_launches,
    compile_for_hopper,
    launches_of,
    layout,
    record,
    rows_of,
    triton_op,
)

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton_launches.toolchain() is None,
    reason="nothing is compiled: TRITON_INTERPRET=1, or this triton has no cuobjdump",
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_partial_sums_load_as_their_documentation_says(name: str, remembered: Path | None) -> None:
    run = triton_op("channel_sums")
    assert run is not None
    launch = record(lambda: run(layout(name), layout(name)))[0]
    for row in rows_of(launch, remembered):
        counts = [re.fullmatch(rf"(\d+) {LAYOUTS[name][3]}(\.\w+)*", text) for text in row.loads.split(", ")]
        assert all(counts), row.loads
        assert sum(int(count[1]) for count in counts if count) >= 2


def test_every_kernel_is_launched_by_some_op() -> None:
    """A kernel that no recorded launch reaches would be in no table."""
    import triton

    launched = {launch.kernel.__name__ for launch in all_launches()}
    modules = {launch.kernel.fn.__module__ for launch in all_launches()}
    kernels = {
        value.__name__
        for module in modules
        for value in vars(__import__(module, fromlist=["_"])).values()
        if isinstance(value, triton.runtime.jit.JITFunction) and value.__name__.endswith("_kernel")
    }
    assert kernels - launched == set(), "not launched by what triton_launches.CALLS or tests/ops/inputs.py call"


def test_names_tell_launches_apart() -> None:
    counts = collections.Counter(launch.name for launch in all_launches())
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("op", triton_launches.ops())
def test_resources_are_those_of_the_table(op: str, remembered: Path | None) -> None:
    measured = [row for launch in launches_of(op) for row in rows_of(launch, remembered)]
    assert [f"{row}: spills" for row in measured if row.spills or row.stack] == []
    table = [row for row in resources.read_table() if row.toolchain == triton_launches.toolchain()]
    if not table:
        pytest.skip(f"{resources.TABLE.name} has no {triton_launches.toolchain()}; nothing spills")
    mine = {row.place for row in measured}
    assert resources.problems_of(measured, [row for row in table if row.place in mine]) == []


def test_the_table_has_no_line_too_many() -> None:
    kernels = {launch.name for launch in all_launches()}
    lines = [row for row in resources.read_table() if row.toolchain == triton_launches.toolchain()]
    assert sorted({row.kernel for row in lines} - kernels) == [], f"no longer launched: run {resources.WRITE}"


@pytest.mark.parametrize(("post", "splits"), [(1, 4), (2, 32)])
def test_the_finish_over_other_numbers_of_splits(post: int, splits: int, tmp_path: Path) -> None:
    import triton.language as tl

    from taylor_cuda.kernels import _sums

    constants = {"MAP": post, "SQUARE_TOTAL": False, "ADD": False, "ACC": tl.float32}
    blocks = {"BLOCK_N": 128 // splits, "BLOCK_S": splits, "BLOCK_C": 32}
    types = {"t_ptr": "fp32", "out_ptr": "fp32"}
    compiled = compile_for_hopper(_sums.finish_channels_kernel, {**constants, **blocks}, types, 8, tmp_path)
    assert (compiled.spills, compiled.stack) == (0, 0)
