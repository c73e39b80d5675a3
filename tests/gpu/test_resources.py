"""What the comparison with the table of kernels says; the kernels are in test_nvcc and test_triton_compiled."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu import resources
from tests.gpu.resources import MARGIN, Row, problems_of, unkept_promises

ROW = Row(
    "nvcc 13.0", "channel_sums", "column_sums_kernel<float, 4, true>", "sm_90", 64, 0, 0, 4096, 8, 2, "8 LDG.E.128"
)


def test_what_is_as_it_was_or_better_is_no_problem() -> None:
    assert problems_of([ROW], [ROW]) == []
    better = replace(ROW, registers=40, shared=0)
    assert problems_of([better], [ROW]) == []
    assert problems_of([replace(ROW, registers=ROW.registers + MARGIN)], [ROW]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registers": ROW.registers + MARGIN + 1}, r"73 registers, 64 in the table; .* run python -m"),
        ({"registers": 129}, "at most 128 let two blocks of 256 threads run"),
        ({"spills": 2}, "2 loads and stores of spilled registers, 0 bytes of stack; give a thread less"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"wide_loads": 7}, "7 16-byte loads, 8 in the table; if it lost some, the compiler no longer knows"),
        ({"wide_stores": 0}, "0 16-byte stores, 2 in the table"),
        ({"shared": 8192}, "8192 bytes of shared memory, 4096 in the table"),
        ({"kernel": "new_kernel<float>"}, r"new_kernel<float> for sm_90 .* is not in resources.jsonl: run python -m"),
    ],
)
def test_what_changed_is_said_with_what_to_do(change: dict[str, object], message: str) -> None:
    problems = problems_of([replace(ROW, **change)], [ROW])
    assert any(re.search(message, text) for text in problems), problems


def test_a_kernel_that_is_gone_is_said() -> None:
    assert problems_of([], [ROW]) == [f"{ROW} is in resources.jsonl and no longer compiled: run {resources.WRITE}"]


def test_a_source_says_which_of_its_kernels_load_widely() -> None:
    assert unkept_promises("channel_sums", [ROW]) == []
    (missing,) = unkept_promises("channel_sums", [replace(ROW, wide_loads=0)])
    assert "0 16-byte loads" in missing
    (nothing,) = unkept_promises("channel_sums", [replace(ROW, kernel="other_kernel<float>")])
    assert "no kernel fits" in nothing
    (new,) = unkept_promises("new_op", [ROW])
    assert "new_op.cu has no line in WIDE" in new


def test_writing_leaves_the_lines_of_other_toolchains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.jsonl")
    other = replace(ROW, toolchain="triton 3.6.0")
    resources.write_table([other, ROW])
    changed = replace(ROW, registers=50)
    resources.write_table([changed])
    assert resources.read_table() == [changed, other]


def test_what_was_measured_is_remembered_by_its_key(tmp_path: Path) -> None:
    runs: list[int] = []

    def measure() -> list[Row]:
        runs.append(1)
        return [ROW]

    for key in ("one", "one", "two", "one"):
        assert resources.remembered(tmp_path, "source", key, measure) == [ROW]
    assert len(runs) == 3  # of each name only the last is kept
    resources.remembered(None, "source", "one", measure)
    assert len(runs) == 4
