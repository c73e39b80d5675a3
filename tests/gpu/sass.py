"""Registers, stack, shared memory and instructions of compiled kernels, as CUDA's disassembler shows them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel uses. ``shared`` is in bytes; ``file`` is its source, where the binary names it."""

    name: str
    arch: str
    file: str
    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]

    def count(self, prefix: str) -> int:
        """How many instructions begin so."""
        return sum(instruction.startswith(prefix) for instruction in self.instructions)

    def wide(self, prefix: str) -> int:
        """How many instructions begin so and move 16 bytes."""
        return sum(name.startswith(prefix) and "128" in name.split(".") for name in self.instructions)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory, which is where registers spill."""
        return self.count("LDL") + self.count("STL")


def toolkit(program: str) -> str | None:
    """A program of the CUDA toolkit: of CUDA_HOME, on the PATH, or where it is installed by default."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = (path for home in homes if home and (path := shutil.which(program, path=f"{home}/bin")))
    return next(found, shutil.which(program))


def cuobjdump() -> str | None:
    """The disassembler in Triton's wheel, or else the toolkit's."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.is_file():
            return str(path)
    return toolkit("cuobjdump")


def kernels_of(binary: Path) -> list[Kernel]:
    """Every kernel of a cubin, of a fatbin, or of a library that holds fatbins, once for each architecture."""
    found = []
    code = {(arch, file): text for arch, file, text in _parts(binary, "--dump-sass")}
    for arch, file, usage in _parts(binary, "--dump-resource-usage"):
        bodies = dict(part.split("\n", 1) for part in code[arch, file].split("Function : ")[1:])
        pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
        for name, *numbers in re.findall(pattern, usage):
            registers, stack, shared = map(int, numbers)
            found.append(Kernel(name, arch, file, registers, stack, shared, tuple(INSTRUCTION.findall(bodies[name]))))
    return found


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def _parts(binary: Path, option: str) -> list[tuple[str, str, str]]:
    """(architecture, source file, output) for each part of a binary; a cubin has one part, without either."""
    command = [str(cuobjdump()), option, str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^Fatbin elf code:\n=+\n", text, flags=re.MULTILINE)[1:] or [text]
    return [(_after(r"^arch = ", part), Path(_after(r"^identifier = ", part)).name, part) for part in parts]


def _after(label: str, text: str) -> str:
    found = re.search(label + r"(.*)$", text, flags=re.MULTILINE)
    return found[1] if found else ""


def readable(names: list[str]) -> list[str]:
    """Kernels as the sources write them, ``rows_kernel<float, 4>``: demangled, without namespaces and parameters."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return names
    done = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True)
    lines = [re.sub(r"\([\w:]+\)(\d+)", r"\1", line) for line in done.stdout.splitlines()]  # (taylor::Mode)2
    plain = [re.sub(r"(?:\w+|\(anonymous namespace\))::|^void ", "", line) for line in lines]
    return [re.sub(r"^void ", "", line).partition("(")[0] for line in plain]
