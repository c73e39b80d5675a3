"""Registers, stack and instructions of compiled kernels, read with the tools that Triton's wheel carries."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel uses."""

    name: str
    registers: int
    stack: int
    instructions: tuple[str, ...]

    def count(self, prefix: str) -> int:
        """How many instructions begin so."""
        return sum(instruction.startswith(prefix) for instruction in self.instructions)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory, which is where registers spill."""
        return self.count("LDL") + self.count("STL")


def cuobjdump() -> str | None:
    """The disassembler in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


def kernels_of(cubin: Path) -> list[Kernel]:
    """Every kernel of a cubin."""
    usage = _run("--dump-resource-usage", cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    code = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", _run("--dump-sass", cubin), flags=re.DOTALL)
    )
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    return [Kernel(name, int(reg), int(stack), tuple(instruction.findall(code[name]))) for name, reg, stack in found]


def _run(option: str, cubin: Path) -> str:
    return subprocess.run([str(cuobjdump()), option, str(cubin)], capture_output=True, text=True, check=True).stdout
