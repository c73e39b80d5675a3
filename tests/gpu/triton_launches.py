"""Every launch of the Triton ops for shapes of networks, recorded on meta tensors and compiled without a GPU.

The ops run as they are; where they would launch a kernel, its arguments are noted. What the JIT would know of them
(types, multiples of 16, constants) goes to the compiler. An op that is not in ``CALLS`` is called with what
``tests/ops/inputs.py`` has for it, so a new kernel needs no line here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from taylor_cuda.ops import backends
from tests.gpu import conv_launches, emulator, resources, sass
from tests.ops import inputs

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
TYPES |= {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1"}


@dataclass(frozen=True)
class Launch:
    """A kernel, and what the compiler is told of its arguments; texts, so that equal launches compare equal."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    multiples: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The kernel and its constants, which is how the sources name an instance."""
        types = [kind for _, kind in self.signature if kind.startswith("*")]
        wide = [f"{name}:{kind}" for name, kind in self.signature if kind in ("i64", "fp32")]
        pointers = [name for name, kind in self.signature if kind.startswith("*")]
        odd = [f"{name} off 16 bytes" for name in pointers if name not in self.multiples]
        plain = [f"{name}={value}" for name, value in (*self.constants, *self.options) if name != "enable_fp_fusion"]
        return f"{self.kernel.__name__}<{', '.join([*types, *wide, *odd, *plain])}>"


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches of one call, which runs none."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup
        size = grid if isinstance(grid, tuple) else grid(kwargs)
        assert 0 < size[0] < 2**31, f"{kernel.__name__}: a grid of {size}"
        assert all(0 < other < 2**16 for other in size[1:]), f"{kernel.__name__}: a grid of {size}"
        found.append(_launch_of(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", note):
        call()
    return found


def _launch_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples: list[str] = []
    for parameter in kernel.params:
        value = given.pop(parameter.name, parameter.default if parameter.has_default else None)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            if special and value.storage_offset() * value.element_size() % 16 == 0:
                multiples.append(parameter.name)
        else:
            signature[parameter.name] = _scalar(value)
            if special and type(value) is int and value % 16 == 0:
                multiples.append(parameter.name)
    return Launch(kernel, *(tuple(d.items()) for d in (signature, constants)), tuple(multiples), tuple(given.items()))


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, arch: str, folder: Path) -> tuple[sass.Kernel, int]:
    """The compiled kernel and its shared memory in bytes, which a cubin does not say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = [parameter.name for parameter in launch.kernel.params]
    aligned = {(places.index(name),): [["tt.divisibility", 16]] for name in launch.multiples}
    source = ASTSource(
        fn=launch.kernel, signature=dict(launch.signature), constexprs=dict(launch.constants), attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=dict(launch.options))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    (kernel,) = sass.kernels_of(cubin)
    return kernel, compiled.metadata.shared


def compile_for_hopper(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, folder: Path
) -> sass.Kernel:
    """A kernel with constants of one's own, 16-byte aligned pointers to ``types`` and 32-bit sizes.

    Arguments ending in ``_ptr`` are pointers, and ``momentum`` and ``eps`` are floats.
    """
    names = [parameter.name for parameter in kernel.params]
    numbers = dict.fromkeys(names, "i32") | dict.fromkeys(("momentum", "eps"), "fp32")
    pointers = {name: f"*{types[name]}" for name in names if name.endswith("_ptr") and name not in constants}
    signature = {name: "constexpr" if name in constants else pointers.get(name, numbers[name]) for name in names}
    options = (("num_warps", warps), ("enable_fp_fusion", True))
    launch = Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(pointers), options)
    return compile_launch(launch, "sm_90", folder)[0]


# -- what is launched ---------------------------------------------------------


def _nhwc(*shape: int) -> tuple[int, ...]:
    _, c, h, w = shape
    return (c * h * w, 1, w * c, c)


# Layout: shape, strides (None: contiguous), type, and the loads that the documentation of the kernels promises for it.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype, str]] = {
    "nhwc bf16": ((256, 64, 56, 56), _nhwc(256, 64, 56, 56), torch.bfloat16, "LDG.E.128"),
    "nhwc fp32": ((256, 64, 56, 56), _nhwc(256, 64, 56, 56), torch.float32, "LDG.E.128"),
    "nhwc bf16, 24 channels": ((64, 24, 28, 28), _nhwc(64, 24, 28, 28), torch.bfloat16, "LDG.E.128"),
    "nhwc bf16, 7x7": ((256, 512, 7, 7), _nhwc(256, 512, 7, 7), torch.bfloat16, "LDG.E.128"),
    "nhwc bf16, 13 channels": ((64, 13, 28, 28), _nhwc(64, 13, 28, 28), torch.bfloat16, "LDG.E.U16"),
    "nhwc bf16, cropped": ((64, 64, 28, 28), (64 * 900, 1, 64 * 30, 64), torch.bfloat16, "LDG.E.128"),
    "nchw bf16": ((256, 64, 56, 56), None, torch.bfloat16, "LDG.E.128"),
    "nchw fp32": ((256, 64, 56, 56), None, torch.float32, "LDG.E.128"),
    "nchw bf16, 14x14": ((256, 256, 14, 14), None, torch.bfloat16, "LDG.E.64"),
    "nchw bf16, 7x7": ((256, 512, 7, 7), None, torch.bfloat16, "LDG.E.U16"),
    "nchw fp32, cropped": ((64, 64, 28, 28), (64 * 900, 900, 30, 1), torch.float32, "LDG.E"),
    "[N, C] bf16": ((4096, 1024), None, torch.bfloat16, "LDG.E.128"),
    "[N, L, C] bf16": ((256, 768, 197), (197 * 768, 1, 768), torch.bfloat16, "LDG.E.128"),
}


def layout(name: str) -> Tensor:
    """A tensor without memory."""
    shape, strides, dtype, _ = LAYOUTS[name]
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def triton_op(op: str) -> Callable[..., Any] | None:
    """What runs for CUDA tensors."""
    return backends.find(op, "triton", "cuda")


CALLS: dict[str, Callable[[Callable[..., Any]], object]] = {
    "channel_sums": lambda op: [op(layout(name), layout(name)) for name in LAYOUTS],
    "channel_importance": lambda op: [
        op(layout("nhwc bf16"), layout("nhwc bf16"), reduction)
        for reduction in ("batch", "sample", "abs", "element", "all")
    ],
    "accumulate_channel_sums": lambda op: [
        op(layout("nhwc bf16"), layout("nhwc bf16"), torch.empty(shape, device="meta")) for shape in ((64,), (256, 64))
    ],
    "masked_conv2d_forward": conv_launches.forward,
    "masked_conv2d_backward": conv_launches.backward,
}


def ops() -> list[str]:
    """The ops that have a Triton kernel."""
    return [op for op in backends.OPS if triton_op(op) is not None]


def launches_of(op: str) -> list[Launch]:
    """The launches of an op, each once."""
    run = triton_op(op)
    assert run is not None
    call = CALLS.get(op)
    if call is None:
        calls = inputs.calls_of(op, torch.bfloat16, "meta")
        return list(dict.fromkeys(record(lambda: [run(*arguments) for arguments in calls])))
    return list(dict.fromkeys(record(lambda: call(run))))


def toolchain() -> str | None:
    """``triton 3.6.0``, or None where nothing can be compiled."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or importlib.util.find_spec("triton") is None or sass.cuobjdump() is None:
        return None
    return f"triton {importlib.metadata.version('triton')}"


def row_of(launch: Launch, arch: str) -> resources.Row:
    """The line of a launch."""
    with tempfile.TemporaryDirectory() as folder:
        kernel, shared = compile_launch(launch, arch, Path(folder))
    source = launch.kernel.fn.__module__.rpartition(".")[2]
    return resources.row_of(kernel, str(toolchain()), source, launch.name, arch, shared)


def architectures_of(launch: Launch) -> tuple[str, ...]:
    """All for the first launch of each kernel, the last alone for others of it: each takes a second to compile."""
    first = next(other for other in all_launches() if other.kernel is launch.kernel)
    return resources.architectures() if launch == first else resources.architectures()[-1:]


def rows_of(launch: Launch, folder: Path | None = None) -> list[resources.Row]:
    """The lines of a launch."""
    sources = sorted((emulator.ROOT / "kernels").glob("*.py"))
    parts = (launch.signature, launch.constants, launch.multiples, launch.options)
    architectures = architectures_of(launch)
    settings = (toolchain(), architectures, launch.name, *map(repr, parts))
    key = resources.fingerprint(*settings, Path(__file__), *sources)
    name = f"{launch.kernel.__name__}.{resources.fingerprint(launch.name)[:8]}"
    return resources.remembered(folder, name, key, lambda: [row_of(launch, arch) for arch in architectures])


@functools.cache
def all_launches() -> list[Launch]:
    """Of every op, each once; ops share kernels."""
    return list(dict.fromkeys(launch for op in ops() for launch in launches_of(op)))


def all_rows() -> list[resources.Row]:
    """The lines of everything that is launched; none where nothing can be compiled."""
    return [row for launch in all_launches() for row in rows_of(launch)] if toolchain() is not None else []
