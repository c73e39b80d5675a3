"""Steps from one value to one, as lines of code with gaps: the alphabet of ``draw_nets.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, int]
"""Channels and pixels a side of a map, or channels and length of tokens."""
NewShape = Callable[[int, int], Shape | None]

MOST = 48


def _same(c: int, s: int) -> Shape:
    return c, s


def _even(c: int, s: int) -> Shape | None:
    return (c, s) if c % 2 == 0 else None


def _half(c: int, s: int) -> Shape | None:
    return (c // 2, s) if c % 2 == 0 else None


def _double(c: int, s: int) -> Shape | None:
    return (2 * c, s) if 2 * c <= MOST else None


def _pooled(c: int, s: int) -> Shape | None:
    return (c, s // 2) if s >= 4 else None


@dataclass(frozen=True)
class Line:
    """A step from one value to one: its code, the shape it gives (None: can't be here), and the layer it makes."""

    code: str
    shape: NewShape = _same
    layer: str = ""


# {x} the value, {l} the layer, {c} channels, {s} pixels, {d} spatial dimensions, {h} half the channels,
# {ones} and {space} a 1 and the pixels for each spatial dimension, {zeros} two zeros for each
PLAIN = [
    *(Line(f"{name}({{x}})") for name in ("F.relu", "F.gelu", "F.silu", "torch.tanh", "torch.sigmoid", "F.hardswish")),
    Line("F.relu_({x} * 1)"),
    Line("{l}({x})", layer="nn.PReLU({c})"),
    *(
        Line("{l}({x})", layer=layer)
        for layer in (
            "nn.BatchNorm{d}d({c})",
            "nn.BatchNorm{d}d({c})",
            "nn.BatchNorm{d}d({c}, affine=False)",
            "nn.BatchNorm{d}d({c}, track_running_stats=False)",
            "nn.InstanceNorm{d}d({c})",
            "nn.InstanceNorm{d}d({c}, affine=True)",
            "nn.InstanceNorm{d}d({c}, affine=True, track_running_stats=True)",
            "nn.GroupNorm({c}, {c})",
            "nn.Dropout(0.3)",
            "nn.Dropout{d}d(0.3)",
        )
    ),
    Line("{l}({x})", _even, "nn.GroupNorm({h}, {c})"),
    Line("{l}({x})", _even, "nn.GroupNorm(2, {c})"),
    Line("{l}({x}.transpose(1, -1)).transpose(1, -1)", layer="nn.LayerNorm({c})"),
    Line("F.dropout({x}, 0.3, self.training and self.dropping)"),
    Line("F.max_pool{d}d({x}, 2)", _pooled),
    Line("F.avg_pool{d}d({x}, 2)", _pooled),
    Line("F.max_pool{d}d({x}, 3, 1, 1)"),
    Line("F.adaptive_avg_pool{d}d({x}, 4)", lambda c, s: (c, 4)),
    Line("F.interpolate({x}, scale_factor=2.0)", lambda c, s: (c, 2 * s) if s <= 5 else None),
    Line("{x} * {l}", layer="nn.Parameter(torch.full(({c}, {ones}), 1e-6))"),
    Line("{x} + {l}", layer="torch.ones(1, {c}, {ones})"),
    Line("({x} - {l}) / {l}.abs().add(1)", layer="torch.zeros(1, {c}, {ones})"),
    Line("{x}.permute(0, *range(2, {x}.dim()), 1).contiguous().movedim(-1, 1)"),
    Line("torch.cat([{x}, {x}.flip(2)], 1)", _double),
    Line("{x}.reshape({x}.shape[0], {x}.shape[1], -1).reshape({x}.shape)"),
    Line("torch.where({x} > 0, {x}, 0.1 * {x})"),
    Line("F.glu({x}, 1)", _half),
    Line("{x} * F.adaptive_avg_pool{d}d({x}, 1).sigmoid()"),
    Line("checkpoint({l}, {x}, use_reentrant=False)", lambda c, s: (8, s), "nn.Conv{d}d({c}, 8, 1)"),
    Line(
        "{x} + ({l}.lerp_({x}.detach().mean({axes}, keepdim=True), 0.1) if self.training else {l}).clone()",
        layer="torch.zeros(1, {c}, {ones})",
    ),
]
HARD = [
    Line("{x}[:, :{h}]", _half),
    Line("{x}[:, {h}:]", _half),
    Line("{x}[:, ::2]", _half),
    Line("{x}[:, {x}.shape[1] // 2:]", _half),
    Line("{x}.reshape({x}.shape[0], {c}, -1).reshape({x}.shape[0], {c}, {space})"),
    Line(
        "{x}.reshape({x}.shape[0], -1, {c}).reshape({x}.shape)",
        lambda c, s: (c, s) if s * s % c == 0 or s == c else None,
    ),
    Line("{x} / {x}.shape[1]"),
    Line("{x} * {x}.shape[1] ** -0.5"),
    Line("F.pad({x}, ({zeros}, 0, 2))", lambda c, s: (c + 2, s)),
    Line("{x} - {x}.mean(1, keepdim=True)"),
    Line("{x} * {x}.amax(1, keepdim=True).sigmoid()"),
    Line("{x} / {x}.norm(dim=1, keepdim=True).add(1)"),
    Line("{x}.softmax(1)"),
    Line("F.normalize({x}, dim=1)"),
    Line("F.local_response_norm({x}, 3)"),
    Line("{l}({x})", layer="nn.GroupNorm(1, {c})"),
    Line("{x}.reshape({x}.shape[0], 2, {x}.shape[1] // 2, {space}).transpose(1, 2).reshape({x}.shape)", _even),
    Line("{x}.reshape({x}.shape[0], {h}, 2, {space}).transpose(1, 2).reshape({x}.shape[0], -1, {space})", _even),
    Line("{x}.roll(1, 1)"),
    Line("{x}.flip(1)"),
    Line("{x}.cumsum(1)"),
    Line("{x}.repeat(1, 2, {ones})", _double),
    Line("{x}.repeat_interleave(2, 1)", _double),
    Line("torch.cat([{x}, torch.zeros_like({x})], 1)", _double),
    Line("torch.cat([{x}, {x}.new_zeros({x}.shape[0], 2, {space})], 1)", lambda c, s: (c + 2, s)),
    Line("torch.stack([{x}, {x}.flip(2)], 1).sum(1)"),
    Line("torch.stack([{x}, {x}.flip(2)], 2).flatten(1, 2)", _double),
    Line("{l}({x})", layer="nn.LayerNorm([{c}, {space}])"),
    Line("torch.einsum('nc...,dc->nd...', {x}, {l})", lambda c, s: (4, s), "nn.Parameter(torch.randn(4, {c}))"),
    Line("{x} * torch.linspace(0, 1, {x}.shape[1], dtype={x}.dtype).reshape(-1, {ones})"),
    Line("{x} + {l}", layer="nn.Parameter(torch.zeros({c}, {space}))"),
    Line("{x}.unflatten(1, (2, -1)).sum(1)", _half),
    Line("{x}.unflatten(1, (-1, 2)).mean(2)", _half),
    Line("torch.sort({x}, 1).values"),
    Line("F.group_norm({x}, 2, {l}, {l})", _even, "nn.Parameter(torch.ones({c}))"),
    Line("F.group_norm({x}, {x}.shape[1] // 2)", _even),
    Line("F.layer_norm({x}.movedim(1, -1), {x}.shape[1:2], {l}).movedim(-1, 1)", layer="nn.Parameter(torch.ones({c}))"),
    Line("F.batch_norm({x}, None, None, training=True)"),
    Line("F.conv{d}d({x}, {l}, groups={x}.shape[1])", layer="nn.Parameter(torch.randn({c}, 1, {ones}))"),
    Line("F.conv{d}d({x}, {l}, groups={c})", layer="nn.Parameter(torch.randn({c}, 1, {ones}))"),
    Line("F.conv{d}d({x}, {l} - {l}.mean(1, keepdim=True))", layer="nn.Parameter(torch.randn({c}, {c}, {ones}))"),
    Line("{l}({x}.flatten(0, 1).unsqueeze(1)).unflatten(0, {x}.shape[:2]).flatten(1, 2)", layer="nn.Conv{d}d(1, 1, 1)"),
    Line("{x}[:, {l}]", layer="torch.randperm({c})"),
    Line("torch.fft.irfft(torch.fft.rfft({x}), n={s})"),
    Line("sum(torch.cat([{x}, {x}.flip(2)], 0).chunk(2, 0))"),
    Line("{x}.clone().index_fill_(1, torch.tensor([0]), 0)"),
    Line("torch.cat([{x}[:, -1:], {x}[:, :-1]], 1)"),
    Line("{x}[:, 1:] + {x}[:, :-1]", lambda c, s: (c - 1, s) if c > 2 else None),
    Line("{x} - {x}.mean()"),
    Line("{x} / {x}.std((1, 2), keepdim=True).add(1)"),
]
# a number of channels in code that the proof's one drawn cut, in one mode, doesn't show; not among the drawn networks
HIDDEN = [
    Line("{x} / {x}.shape[1] if self.training else {x}"),
    Line("{x} if {x}.shape[1] > 3 else -{x}"),
    Line("{x} * min({x}.shape[1], 4)"),
    Line("F.relu(F.group_norm({x}, 2, {l}, {l} - 1))", _even, "nn.Parameter(torch.ones({c}))"),
    Line("F.relu(0.5 * {x}.sigmoid() - {l}) * {x}.shape[1]", layer="nn.Parameter(torch.full(({c}, {ones}), 0.2))"),
]
FLAT_IMAGES = [
    Line("F.pixel_shuffle({x}, 2)", lambda c, s: (c // 4, 2 * s) if c % 4 == 0 and s <= 5 else None),
    Line("F.pixel_unshuffle({x}, 2)", lambda c, s: (4 * c, s // 2) if s % 2 == 0 and 4 * c <= MOST else None),
    Line("F.channel_shuffle({x}, 2)", _even),
    Line("F.interpolate({x}, size=(5, 5), mode='bilinear')", lambda c, s: (c, 5)),
    Line(
        "F.unfold({x}, 2, stride=2).unflatten(2, ({s} // 2, -1))",
        lambda c, s: (4 * c, s // 2) if 4 * c <= MOST else None,
    ),
    Line("{l}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", lambda c, s: (6, s), "nn.Linear({c}, 6)"),
]
TOKENS = [
    Line("F.gelu({x})"),
    Line("{l}({x})", layer="nn.LayerNorm({c})"),
    Line("{l}({x})", layer="nn.LayerNorm({c}, bias=False)"),
    Line("{l}({x})", layer="nn.LayerNorm({c}, elementwise_affine=False)"),
    Line("{l}({x})", layer="nn.RMSNorm({c})"),
    Line("{x} * ({x}.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * {l}", layer="nn.Parameter(torch.ones({c}))"),
    Line("{x} + {l}", layer="nn.Parameter(torch.zeros(1, {s}, {c}))"),
    Line("{x} + {x} * {l}", layer="nn.Parameter(torch.full(({c},), 1e-6))"),
    Line("{x} + {l}({x}, {x}, {x})[0]", _even, "nn.MultiheadAttention({c}, 2, batch_first=True)"),
    Line("{l}({x})", _even, "nn.TransformerEncoderLayer({c}, 2, 6, 0.0, batch_first=True)"),
    Line("{l}({x})[0]", layer="nn.GRU({c}, {c}, batch_first=True)"),
    Line("{x} + {x} @ {l}", layer="nn.Parameter(torch.zeros({c}, {c}))"),
    Line("torch.softmax({x}, 1) * {x}"),
    Line("{x} + {l}({x}.transpose(1, 2)).transpose(1, 2)", layer="nn.Linear({s}, {s})"),
]
