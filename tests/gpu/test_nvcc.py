"""Every CUDA source compiled for Ampere and Hopper, without a GPU: nothing spills, and wide loads stay wide."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import resources, sass
from tests.gpu.resources import Row

pytestmark = [
    pytest.mark.skipif(
        resources.nvcc_toolchain() is None, reason="no nvcc (looked in CUDA_HOME, /usr/local/cuda and on the PATH)"
    ),
    pytest.mark.skipif(sass.cuobjdump() is None, reason="no cuobjdump (Triton's wheel has one, and the CUDA toolkit)"),
]


@pytest.fixture(scope="module")
def built(remembered: Path | None) -> list[Row]:
    """The lines of what setup.py built, if that is newer than the sources."""
    if not resources.library_is_new():
        return []
    key = resources.fingerprint(resources.nvcc_toolchain(), resources.LIBRARY, Path(resources.__file__))
    return resources.remembered(remembered, "library", key, resources.rows_of_library)


def rows_of(source: Path, built: list[Row], folder: Path | None) -> list[Row]:
    """The lines of a source: of the library, and of what has to be compiled for want of it."""
    rows = [row for row in built if row.source == source.stem and row.arch in resources.architectures()]
    if {row.arch for row in rows} == set(resources.architectures()):
        return rows
    key = resources.fingerprint_of_source(source)
    return resources.remembered(folder, source.stem, key, lambda: resources.rows_of_source(source))


@pytest.mark.parametrize("source", resources.SOURCES, ids=lambda path: path.name)
def test_resources_are_those_of_the_table(source: Path, built: list[Row], remembered: Path | None) -> None:
    measured = rows_of(source, built, remembered)
    assert measured
    assert [f"{row}: spills" for row in measured if row.spills or row.stack] == []
    assert resources.unkept_promises(source.stem, measured) == []
    table = [row for row in resources.read_table() if row.toolchain == resources.nvcc_toolchain()]
    if not table:
        pytest.skip(f"{resources.TABLE.name} has no {resources.nvcc_toolchain()}; nothing spills, wide loads are there")
    there = {row.arch for row in measured}
    assert resources.problems_of(measured, [r for r in table if r.source == source.stem and r.arch in there]) == []


def test_every_line_has_a_source() -> None:
    stems = {path.stem for path in resources.SOURCES}
    lines = {row.source for row in resources.read_table() if row.toolchain.startswith("nvcc")}
    assert sorted(lines - stems) == [], f"no longer there: run {resources.WRITE}"
