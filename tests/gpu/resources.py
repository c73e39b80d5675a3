"""What every shipped kernel uses, measured without a GPU: ``python -m tests.gpu.resources --write`` makes the table.

``resources.jsonl`` has a line for each kernel, architecture and toolchain. Registers differ from one compiler to the
next, so a table says nothing of another's code; writing replaces the lines of the toolchains that are here and leaves
those of others. Nothing that spills or lost a wide load that its source promises gets into the table.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import taylor_cuda
from tests.gpu import emulator, sass

TABLE = Path(__file__).parent / "resources.jsonl"
WRITE = "python -m tests.gpu.resources --write"
SOURCES = sorted((emulator.ROOT / "csrc" / "cuda").glob("*.cu"))
LIBRARY = Path(taylor_cuda.__file__).parent / "_C_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90")
MARGIN = 8  # registers are allocated in eights
MOST_REGISTERS = 128  # two blocks of 256 threads on a multiprocessor at the least

# Kernels that load 16 bytes at a time wherever they load, by source: a new source needs its line. What stores so too
# has a * at the end of its pattern.
WIDE = {
    "accumulate_channel_sums": "",
    "channel_importance": r"(column_sums|row_sums|packed_sums)_kernel<\w+, [248],",
    "channel_sums": r"(column_sums|row_sums|packed_sums)_kernel<\w+, [248],",
    "accumulate_importance": "",  # gathers
    "keep_mask": "",  # scores in any stride
    "score_relu_backward": r"(column|row|packed)_relu_kernel<\w+, [248],*",
    "pack_channels": r"pack_channels_kernel<[\w ]+, [248]>*",
    "unpack_channels": r"unpack_channels_kernel<[\w ]+, [248]>*",
    "gather_kept": r"gather_kept_kernel*",
    "scatter_kept": r"scatter_\w+_kernel*",
    "weight_importance": r"weights_kernel<\w+, \w+, [248]>",
}


@dataclass(frozen=True)
class Row:
    """A line of the table. Wide are instructions that move 16 bytes; bytes of ``shared`` are 1 KiB more on Hopper.

    ``loads`` are those from global memory, such as ``8 LDG.E.128``.
    """

    toolchain: str
    source: str
    kernel: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    wide_loads: int
    wide_stores: int
    loads: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.toolchain, self.source, self.kernel, self.arch

    def __str__(self) -> str:
        return f"{self.source}: {self.kernel} for {self.arch} ({self.toolchain})"


def architectures() -> tuple[str, ...]:
    """Those to look at: both, or on a machine with a GPU of one of them that one, whose time is dear."""
    if not torch.cuda.is_available():
        return ARCHITECTURES
    here = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return (here,) if here in ARCHITECTURES else ARCHITECTURES


def row_of(kernel: sass.Kernel, toolchain: str, source: str, name: str, arch: str, shared: int) -> Row:
    """The line of a compiled kernel."""
    wide = kernel.wide("LDG"), kernel.wide("STG")
    loads = collections.Counter(name for name in kernel.instructions if name.startswith("LDG"))
    texts = ", ".join(f"{count} {name}" for name, count in sorted(loads.items()))
    return Row(toolchain, source, name, arch, kernel.registers, kernel.spills, kernel.stack, shared, *wide, texts)


def read_table() -> list[Row]:
    """All lines, of every toolchain."""
    return [Row(**json.loads(line)) for line in TABLE.read_text().splitlines()] if TABLE.is_file() else []


def write_table(measured: Sequence[Row]) -> None:
    """Replace the lines of the toolchains that were measured."""
    here = {row.toolchain for row in measured}
    rows = sorted(
        [row for row in read_table() if row.toolchain not in here] + list(measured), key=lambda row: row.place
    )
    TABLE.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def problems_of(measured: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """What is wrong with kernels of one toolchain, each with what to do about it."""
    known = {row.place: row for row in table}
    found = [text for row in measured if (text := _broken(row))]
    for row in measured:
        expected = known.get(row.place)
        if expected is None:
            found.append(f"{row} is not in {TABLE.name}: run {WRITE} and commit its line")
        else:
            found += [f"{row}: {text}" for text in _changes(row, expected)]
    gone = known.keys() - {row.place for row in measured}
    return found + [f"{known[place]} is in {TABLE.name} and no longer compiled: run {WRITE}" for place in sorted(gone)]


def _broken(row: Row) -> str:
    if row.spills or row.stack:
        return (
            f"{row}: {row.spills} loads and stores of spilled registers, {row.stack} bytes of stack; give a thread "
            "less to hold: a smaller tile or vector, or no array that is indexed by a variable"
        )
    if row.toolchain.startswith("nvcc") and row.registers > MOST_REGISTERS:
        return f"{row}: {row.registers} registers, at most {MOST_REGISTERS} let two blocks of 256 threads run at a time"
    return ""


def _changes(row: Row, expected: Row) -> list[str]:
    found = []
    for name in ("wide_loads", "wide_stores"):
        if getattr(row, name) != getattr(expected, name):
            found.append(
                f"{getattr(row, name)} 16-byte {name[5:]}, {getattr(expected, name)} in the table; if it lost some, "
                f"the compiler no longer knows of an alignment or a multiple; if it is meant, run {WRITE}"
            )
    if row.registers > expected.registers + MARGIN:
        found.append(
            f"{row.registers} registers, {expected.registers} in the table; fewer blocks fit on a multiprocessor. If "
            f"it is worth that, run {WRITE}"
        )
    if row.shared > expected.shared:
        found.append(
            f"{row.shared} bytes of shared memory, {expected.shared} in the table; if it is meant, run {WRITE}"
        )
    return found


def unkept_promises(source: str, measured: Sequence[Row]) -> list[str]:
    """Kernels of a CUDA source that have to load, or load and store, 16 bytes at a time and don't."""
    if source not in WIDE:
        return [f"{source}.cu has no line in WIDE (tests/gpu/resources.py): say which of its kernels load 16 bytes"]
    pattern, stores = WIDE[source].removesuffix("*"), WIDE[source].endswith("*")
    wide = [row for row in measured if pattern and re.match(pattern, row.kernel)]
    if pattern and not wide:
        return [f"{source}.cu: no kernel fits {pattern!r}, its line in WIDE (tests/gpu/resources.py)"]
    return [
        f"{row}: {row.wide_loads} 16-byte loads and {row.wide_stores} stores, against WIDE (tests/gpu/resources.py)"
        for row in wide
        if row.wide_loads < 2 or (stores and row.wide_stores < 1)
    ]


# -- CUDA C++ -----------------------------------------------------------------


@functools.cache
def nvcc_toolchain() -> str | None:
    """``nvcc 13.0``, or None where there is none."""
    program = sass.toolkit("nvcc")
    if program is None:
        return None
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", answer)
    return f"nvcc {release[1]}" if release else None


def compile_source(source: Path, for_architectures: Sequence[str], folder: Path) -> list[sass.Kernel]:
    """The kernels of one source, compiled for several architectures by one call of nvcc."""
    binary = folder / "kernels.fatbin"
    folders = ["-I", str(emulator.ROOT / "csrc"), "-isystem", str(emulator.torch_folder() / "include")]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads", "2", *emulator.STABLE_ABI]
    for arch in for_architectures:
        flags += ["-gencode", f"arch=compute_{arch[3:]},code={arch}"]
    command = [str(sass.toolkit("nvcc")), *flags, *folders, "-fatbin", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return sass.kernels_of(binary)


def rows_of_source(source: Path) -> list[Row]:
    """The lines of one CUDA source."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_source(source, architectures(), Path(folder))
    return _nvcc_rows(kernels, source.stem)


def _nvcc_rows(kernels: Sequence[sass.Kernel], source: str) -> list[Row]:
    names = sass.readable([kernel.name for kernel in kernels])
    toolchain = str(nvcc_toolchain())
    return [row_of(k, toolchain, source, name, k.arch, k.shared) for k, name in zip(kernels, names, strict=True)]


def library_is_new() -> bool:
    """Whether ``setup.py`` built the library after the last change of a source."""
    return LIBRARY.is_file() and LIBRARY.stat().st_mtime >= max(path.stat().st_mtime for path in _inputs())


def rows_of_library() -> list[Row]:
    """The lines of what ``setup.py`` built, for the architectures that it built for."""
    kernels = sass.kernels_of(LIBRARY)
    stems = sorted({Path(kernel.file).stem for kernel in kernels})
    return [row for stem in stems for row in _nvcc_rows([k for k in kernels if Path(k.file).stem == stem], stem)]


def _inputs() -> list[Path]:
    csrc = emulator.ROOT / "csrc"
    return [emulator.ROOT / "setup.py", *csrc.glob("*.h"), *(csrc / "cuda").iterdir()]


def fingerprint(*parts: object) -> str:
    """A hash of texts, and of the content of files."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]


def fingerprint_of_source(source: Path) -> str:
    """Of everything that decides what nvcc makes of a source."""
    headers = [path for path in _inputs() if path.suffix in (".h", ".cuh")]
    return fingerprint(nvcc_toolchain(), torch.__version__, architectures(), Path(__file__), source, *headers)


def remembered(folder: Path | None, name: str, key: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """What ``measure`` gives, or gave for the same key in an earlier run; ``folder`` None remembers nothing."""
    if folder is None:
        return measure()
    file = folder / f"{name}.{key}.jsonl"
    if not file.is_file():
        rows = measure()
        for old in folder.glob(f"{name}.*.jsonl"):
            old.unlink()
        file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()]


def main() -> int:
    """Measure everything that can be compiled here, and write the table with ``--write``."""
    from tests.gpu import triton_launches

    measured, found = [], []
    if nvcc_toolchain() is not None and sass.cuobjdump() is not None:
        for source in SOURCES:
            rows = rows_of_source(source)
            found += unkept_promises(source.stem, rows)
            measured += rows
    measured += triton_launches.all_rows()
    found += [text for row in measured if (text := _broken(row))]
    if sys.argv[1:] == ["--write"] and not found:
        write_table(measured)
    else:
        here = {row.toolchain for row in measured}
        found += problems_of(measured, [row for row in read_table() if row.toolchain in here])
    sys.stderr.write("".join(f"{text}\n" for text in dict.fromkeys(found)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
