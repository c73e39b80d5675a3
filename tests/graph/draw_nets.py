"""Random networks as Python source, for driving the tracer.

A network is drawn step by step: each step is one line of code on named values (``v3 = F.relu(v2)``), and a step that
needs a layer, a parameter or a buffer makes one (``self.l3``). So a failing network prints itself. Widths are 2 to 24
channels, maps 4 to 10 pixels, one or two spatial dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.graph.draw_lines import FLAT_IMAGES, HARD, MOST, PLAIN, TOKENS, Line, Shape

WIDTHS = (2, 3, 4, 6, 8, 8, 12, 12, 16, 24)


@dataclass
class Program:
    """One network.

    Attributes:
        shape: of the input, without the batch.
        layers: ``{attribute: the expression that makes it}``; a tensor is a buffer.
        ties: further lines of ``__init__``.
        steps: lines of ``forward`` before the ``return``.
    """

    shape: tuple[int, ...] = ()
    layers: dict[str, str] = field(default_factory=dict)
    ties: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    result: str = ""

    def source(self) -> str:
        """A class ``Drawn``, as text."""
        made = [f"put(self, {name!r}, {code})" for name, code in self.layers.items()]
        init = ["super().__init__()", "self.dropping = True", *made, *self.ties]
        lines = ["class Drawn(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in init]
        lines += ["    def forward(self, x):", *(f"        {step}" for step in self.steps)]
        return "\n".join([*lines, f"        return {self.result}", ""])

    def build(self) -> nn.Module:
        """The network in train mode, as its layers initialise themselves."""
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "put": _put, "checkpoint": checkpoint}
        exec(compile(self.source(), "drawn_net.py", "exec"), space)
        model: nn.Module = space["Drawn"]()
        return model

    def input(self, batch: int, seed: int) -> Tensor:
        """Random numbers, fp64 ``[batch, *shape]``."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _put(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


class Draft:
    """A network in the making.

    Attributes:
        program: what there is of it.
        maps: ``{value: (channels, pixels)}``.
        convs: ``{layer: (channels in, channels out, kernel)}`` of plain convolutions, for sharing.
        d: spatial dimensions.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.d = self.pick((1, 2, 2))
        size, width = self.pick((4, 6, 8, 10)), self.pick((2, 3, 4))
        self.program = Program(shape=(width, *(size,) * self.d))
        self.maps: dict[str, Shape] = {"x": (width, size)}
        self.convs: dict[str, tuple[int, int, int]] = {}
        self.used: set[str] = set()

    def pick(self, options: Any) -> Any:
        """One of several."""
        return options[self.random.randrange(len(options))]

    def width(self) -> int:
        """Channels of a new layer."""
        return int(self.pick(WIDTHS))

    def layer(self, code: str) -> str:
        """``self.l3``, made by ``code``."""
        name = f"l{len(self.program.layers)}"
        self.program.layers[name] = code
        return f"self.{name}"

    def let(self, code: str, shape: Shape | None = None, *uses: str) -> str:
        """A new value; of ``shape`` if it's a map."""
        name = f"v{len(self.program.steps)}"
        self.program.steps.append(f"{name} = {code}")
        if shape is not None:
            self.maps[name] = shape
        self.used.update(uses)
        return name

    def line(self, line: Line, x: str, shape: Shape, new: Shape | None) -> str:
        """Write one :class:`Line` on ``x``; the new value is a map if ``new`` is given."""
        c, s = shape
        words = {"x": x, "c": c, "s": s, "d": self.d, "h": c // 2, "zeros": ", ".join(["0"] * 2 * self.d)}
        words |= {"axes": (0, *range(2, 2 + self.d))}
        words |= {"ones": ", ".join(["1"] * self.d), "space": ", ".join([str(s)] * self.d)}
        made = self.layer(line.layer.format(**words)) if line.layer else ""
        return self.let(line.code.format(**words, l=made), new, x)

    def some(self, lines: list[Line], x: str) -> str:
        """One of ``lines`` that fits."""
        c, s = self.maps[x]
        line = self.pick([line for line in lines if line.shape(c, s) is not None])
        return self.line(line, x, (c, s), line.shape(c, s))

    def conv(self, x: str, out: int, kernel: int = 0, extra: str = "") -> str:
        """A plain convolution that keeps the size."""
        c, s = self.maps[x]
        kernel = kernel or self.pick((1, 3))
        layer = self.layer(f"nn.Conv{self.d}d({c}, {out}, {kernel}, padding={kernel // 2}{extra})")
        if not extra:
            self.convs[layer] = (c, out, kernel)
        return self.let(f"{layer}({x})", (out, s), x)


def _conv(draft: Draft, x: str) -> None:
    """Any convolution."""
    c, s = draft.maps[x]
    kind = draft.pick(("plain", "plain", "plain", "grouped", "depthwise", "strided", "transposed", "normed"))
    out = draft.width()
    if kind == "strided" and s >= 6:
        layer = draft.layer(f"nn.Conv{draft.d}d({c}, {out}, 3, 2, 1, bias=False)")
        draft.let(f"{layer}({x})", (out, (s + 1) // 2), x)
    elif kind == "transposed" and s <= 5:
        groups = draft.pick([g for g in (1, 2) if c % g == out % g == 0])
        layer = draft.layer(f"nn.ConvTranspose{draft.d}d({c}, {out}, 2, 2, groups={groups})")
        draft.let(f"{layer}({x})", (out, 2 * s), x)
    elif kind == "normed":
        layer = draft.layer(f"nn.utils.parametrizations.weight_norm(nn.Conv{draft.d}d({c}, {out}, 1))")
        draft.let(f"{layer}({x})", (out, s), x)
    elif kind == "depthwise" and 2 * c <= MOST:
        draft.conv(x, draft.pick((c, c, 2 * c)), 3, f", groups={c}")
    elif kind == "grouped" and c % 2 == 0:
        groups = draft.pick([g for g in (2, 4) if c % g == 0])
        draft.conv(x, groups * draft.pick((1, 2, 3)), 0, f", groups={groups}")
    else:
        draft.conv(x, out, 0, draft.pick(("", "", ", bias=False")))


def _normed_conv(draft: Draft, x: str) -> None:
    _conv(draft, x)
    for _ in range(2):
        draft.some(PLAIN, list(draft.maps)[-1])


def _residual(draft: Draft, x: str) -> None:
    """``x`` plus two layers of it, or plus any other value of its shape."""
    others = [name for name, shape in draft.maps.items() if shape == draft.maps[x] and name != x]
    if others and draft.pick((True, False)):
        other = draft.pick(others)
    else:
        hidden = draft.some(PLAIN[:6], draft.conv(x, draft.width()))
        other = draft.conv(hidden, draft.maps[x][0])
    code = draft.pick(("{0} + {1}", "{0} + {1}", "F.relu({0} - {1})", "torch.maximum({0}, {1})", "{0} * {1}.sigmoid()"))
    draft.let(code.format(x, other), draft.maps[x], x, other)


def _concat(draft: Draft, x: str) -> None:
    """Two or three values of one size, one may be there twice."""
    fitting = [name for name, (_, s) in draft.maps.items() if s == draft.maps[x][1]]
    parts = [x, *(draft.pick(fitting) for _ in range(draft.pick((1, 2))))]
    total = sum(draft.maps[part][0] for part in parts)
    if total <= MOST:
        draft.let(f"torch.cat([{', '.join(parts)}], 1)", (total, draft.maps[x][1]), *parts)


def _split(draft: Draft, x: str) -> None:
    """Parts by number or by size, equal or not; perhaps one goes through a layer, and all are put together again."""
    c, s = draft.maps[x]
    forms = [f".split([{1}, {c - 1}], 1)"] if c > 1 else []
    forms += [".chunk(2, 1)", ".chunk(2, 1)", f".split({c // 2}, 1)", ".tensor_split(2, 1)"] if c % 2 == 0 else []
    forms += [".split({x}.shape[1] // 2, 1)", ".unflatten(1, (2, -1)).unbind(1)"] if c % 2 == 0 else []
    if not forms:
        return
    form = draft.pick(forms)
    parts = draft.let(x + form.format(x=x), None, x)
    widths = (1, c - 1) if form.startswith(".split([") else (c // 2, c // 2)
    first, second = (draft.let(f"{parts}[{at}]", (width, s)) for at, width in enumerate(widths))
    use = draft.pick(("c2f", "glu", "leave", "swap", "add"))
    if use == "c2f":
        inner = draft.some(PLAIN[:6], draft.conv(second, draft.width()))
        third = draft.let(f"{second} + {draft.conv(inner, widths[1])}", (widths[1], s), second)
        draft.let(f"torch.cat([{first}, {second}, {third}], 1)", (c + widths[1], s), first, third)
    elif use == "swap":
        draft.let(f"torch.cat([{second}, {first}], 1)", (c, s), first, second)
    elif use != "leave" and widths[0] == widths[1]:
        code = f"{first} * {second}.sigmoid()" if use == "glu" else f"{first} + {second}"
        draft.let(code, (widths[0], s), first, second)


def _excite(draft: Draft, x: str) -> None:
    """Squeeze and excite, or a gate of one channel."""
    c, _ = draft.maps[x]
    if draft.pick((True, True, False)):
        squeezed = draft.let(f"F.adaptive_avg_pool{draft.d}d({x}, 1)", (c, 1), x)
        gate = draft.conv(draft.some(PLAIN[:6], draft.conv(squeezed, draft.pick((2, 3, 4)), 1)), c, 1)
        for name in [name for name, (_, s) in draft.maps.items() if s == 1]:
            del draft.maps[name]
    else:
        gate = draft.conv(x, 1)
    draft.let(f"{x} * {gate}.sigmoid()", draft.maps[x], gate)


def _shared(draft: Draft, x: str) -> None:
    """A layer again, its weight in another layer, or its weight the other way round."""
    c, s = draft.maps[x]
    again = [layer for layer, (a, _, _) in draft.convs.items() if a == c]
    back = [layer for layer, (_, b, _) in draft.convs.items() if b == c]
    if back and draft.pick((True, False, False)):
        layer = draft.pick(back)
        a, _, kernel = draft.convs[layer]
        draft.let(f"F.conv_transpose{draft.d}d({x}, {layer}.weight, padding={kernel // 2})", (a, s), x)
    elif again:
        layer = draft.pick(again)
        _, b, kernel = draft.convs[layer]
        if draft.pick((True, False)):
            draft.let(f"{layer}({x})", (b, s), x)
        else:
            draft.conv(x, b, kernel)
            new = list(draft.convs)[-1]
            draft.program.ties.append(f"{new}.weight = {layer}.weight")
    else:
        square = draft.conv(x, c)
        draft.let(f"{list(draft.convs)[-1]}({square})", (c, s), square)


def _attention(draft: Draft, x: str, c: int) -> str:
    """Attention by hand on tokens, in one head or more."""
    kind = draft.pick(("chunk", "three", "heads", "linear"))
    width = draft.pick((4, 6, 8))
    out = draft.layer(f"nn.Linear({width}, {c})")
    if kind == "three":
        q, k, v = (draft.let(f"{draft.layer(f'nn.Linear({c}, {width})')}({x})") for _ in range(3))
    else:
        qkv = draft.let(f"{draft.layer(f'nn.Linear({c}, {3 * width})')}({x})")
        if kind == "heads":
            shape = draft.pick((f"3, 2, {width // 2}", "3, 2, -1", f"3, -1, {width // 2}"))
            qkv = draft.let(f"{qkv}.view(*{x}.shape[:2], {shape}).permute(2, 0, 3, 1, 4)")
            mixed = draft.let(f"F.scaled_dot_product_attention({qkv}[0], {qkv}[1], {qkv}[2])")
            return draft.let(f"{x} + {out}({mixed}.transpose(1, 2).flatten(2))")
        q, k, v = (draft.let(f"{qkv}.chunk(3, -1)[{at}]") for at in range(3))
    if kind == "linear":
        mixed = draft.let(f"{q} @ ({k}.transpose(1, 2).softmax(-1) @ {v})")
    else:
        scale = draft.pick((0.5, f"{q}.shape[-1] ** -0.5"))
        mixed = draft.let(f"({q} @ {k}.transpose(1, 2) * {scale}).softmax(-1) @ {v}")
    return draft.let(f"{x} + {out}({mixed})")


def _tokens(draft: Draft, x: str) -> None:
    """To tokens, some layers there, and back."""
    c, s = draft.maps[x]
    length = s**draft.d
    value = draft.let(f"{x}.flatten(2).transpose(1, 2)", None, x)
    for _ in range(draft.pick((1, 2, 3))):
        kind = draft.pick(("line", "line", "mlp", "mlp", "gated", "attention"))
        if kind == "line":
            lines = [line for line in TOKENS if line.shape(c, length) is not None]
            value = draft.line(draft.pick(lines), value, (c, length), None)
        elif kind == "attention":
            value = _attention(draft, value, c)
        else:
            hidden = draft.width()
            up = draft.layer(f"nn.Linear({c}, {hidden})")
            side = draft.layer(f"nn.Linear({c}, {hidden})") if kind == "gated" else ""
            down = draft.layer(f"nn.Linear({hidden}, {c})")
            product = f"F.silu({up}({value})) * {side}({value})" if side else f"F.gelu({up}({value}))"
            value = draft.let(f"{value} + {down}({product})")
    space = ", ".join([str(s)] * draft.d)
    back = draft.pick((f".unflatten(2, ({space},))", f".reshape({x}.shape)", f".reshape({x}.shape[0], {c}, {space})"))
    draft.let(f"{value}.transpose(1, 2){back}", (c, s))


def _hard(draft: Draft, x: str) -> None:
    draft.some(HARD + FLAT_IMAGES * 2 if draft.d == 2 else HARD, x)


def _plain(draft: Draft, x: str) -> None:
    draft.some(PLAIN, x)


BLOCKS = [_normed_conv] * 8 + [_plain] * 3 + [_residual] * 4 + [_concat] * 2 + [_split] * 3
BLOCKS += [_excite, _shared, _shared, _tokens, _tokens, _hard, _hard]


def _head(draft: Draft, x: str) -> str:
    """From a map to a flat output."""
    c, _ = draft.maps[x]
    d = draft.d
    pooled = f"F.adaptive_avg_pool{d}d({x}, 2)"
    code, width = draft.pick(
        [
            (f"{x}.mean({tuple(range(2, 2 + d))})", c),
            (f"{x}.mean({tuple(range(2, 2 + d))})", c),
            (f"{x}.amax({tuple(range(2, 2 + d))})", c),
            (f"{pooled}.flatten(1)", c * 2**d),
            (f"{pooled}.movedim(1, -1).flatten(1)", c * 2**d),
            (f"{pooled}.reshape({x}.shape[0], {c * 2**d})", c * 2**d),
        ]
    )
    value = draft.let(code, None, x)
    for out in draft.pick(((3,), (3,), (draft.width(), 3))):
        value = draft.let(f"{draft.layer(f'nn.Linear({width}, {out})')}({value})")
        width = out
        if out != 3:
            value = draft.let(f"F.relu({value})")
    return value


def draw_program(random: Random) -> Program:
    """A network of 3 to 10 blocks."""
    draft = Draft(random)
    draft.conv("x", draft.width())
    for _ in range(draft.pick(range(3, 11))):
        names = list(draft.maps)[1:]
        block = draft.pick(BLOCKS)
        block(draft, draft.pick([*names, *names[-1:] * 2 * len(names)]))
    open_ends = [name for name in draft.maps if name not in draft.used and name != "x"]
    heads = [_head(draft, name) for name in open_ends]
    # what nothing reads comes to nothing: leave some of it so
    kept = [head for head in heads[:-1] if draft.pick((True, True, True, False))] + heads[-1:]
    total = draft.let(" + ".join(kept))
    inner = draft.pick(list(draft.maps)[1:])
    aux = draft.pick([name for name in draft.maps if name != "x"])
    program = draft.program
    form = draft.pick(("plain",) * 6 + ("dict", "inner", "aux", "aux"))
    program.result = total
    if form == "dict":
        program.result = f"{{'y': {total}, 'all': [{', '.join(heads)}]}}"
    elif form == "inner":
        program.result = f"({total}, {inner})"
    elif form == "aux":
        layer = draft.layer(f"nn.Conv{draft.d}d({draft.maps[aux][0]}, 2, 1)")
        program.result = f"({total}, {layer}({aux})) if self.training else {total}"
    for name, code in program.layers.items():
        if code.startswith("nn.Conv") and draft.pick((False,) * 9 + (True,)):
            program.ties.append(f"self.{name}.requires_grad_(False)")
    return program


def program_of(line: Line) -> Program:
    """A convolution, one line on its 8 channels, a convolution and a head."""
    draft = Draft(Random(0))
    draft.d, draft.program = 2, Program(shape=(3, 8, 8))
    draft.maps = {"x": (3, 8)}
    value = draft.conv("x", 8)
    if line in TOKENS:
        value = draft.line(line, draft.let(f"{value}.flatten(2).transpose(1, 2)"), (8, 64), None)
        value = draft.let(f"{value}.transpose(1, 2).unflatten(2, (8, 8))", (8, 8))
    else:
        if line.shape(8, 8) is None:
            value = draft.let(f"F.max_pool2d({value}, 2)", (8, 4))
        value = draft.line(line, value, draft.maps[value], line.shape(*draft.maps[value]))
    value = draft.let(f"F.relu({draft.conv(value, 6)}).mean((2, 3))")
    draft.program.result = f"{draft.layer('nn.Linear(6, 3)')}({value})"
    return draft.program
