"""Rules on their own: views by hand, and ops whose form the networks of ``nets.py`` don't have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.recorder import Called, Dispatched
from taylor_cuda.graph.rules_shape import _blocks
from taylor_cuda.graph.tracer import trace
from tests.graph.base import Net, conv, image
from tests.graph.checks import cut_error, random_plan


def after(x: Tensor, dim: int, function: Any) -> tuple[list[list[int] | None], list[int]]:
    """Labels (0, 1, … along ``dim`` of ``x``) of what ``function`` returns, and which were frozen."""
    holder = nn.Module()
    holder.p = nn.Parameter(torch.zeros(x.shape[dim]))
    flow = Flow(holder)
    flow.put(x, [flow.of(holder.p)[0] if at == dim else None for at in range(x.dim())])
    with torch.no_grad(), Called(holder, flow), Dispatched(flow):
        out = function(x)
    dims = [None if labels is None else labels.tolist() for labels in flow.of(out)]
    solved = flow.labels.solve()
    assert not [reason for reason in solved.reasons if "failed" in reason.text]
    frozen = [node for node in range(x.shape[dim]) if solved.event[solved.root[node]] < len(solved.reasons)]
    return dims, frozen


sdpa = F.scaled_dot_product_attention


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(
    ("shape", "function", "expected"),
    [
        ((2, 3, 4, 5), lambda x: x.flatten(1), [None, [0] * 20 + [1] * 20 + [2] * 20]),
        ((2, 3, 4, 5), lambda x: x.flatten(2), [None, [0, 1, 2], None]),
        ((2, 3, 4, 5), lambda x: x.permute(0, 2, 3, 1).flatten(1), [None, [0, 1, 2] * 20]),
        ((2, 3, 4, 5), lambda x: x.permute(0, 2, 3, 1).reshape(2, 20, 3), [None, None, [0, 1, 2]]),
        ((2, 3, 1, 1), lambda x: x.squeeze(3).squeeze(2), [None, [0, 1, 2]]),
        ((2, 3), lambda x: x[:, :, None, None], [None, [0, 1, 2], None, None]),
        ((2, 3, 4), lambda x: x.view(2, 3, 2, 2), [None, [0, 1, 2], None, None]),
        ((2, 6, 4), lambda x: x.view(2, 2, 3, 4), [None, None, [0, 1, 2], None]),
        ((2, 6, 4), lambda x: x.view(2, -1, 3, 4), [None, [0, 3], None, None]),
        ((2, 6, 4), lambda x: x.reshape((2, 2, -1, 4)), [None, None, [0, 1, 2], None]),
        ((2, 6, 4), lambda x: x.unflatten(1, (-1, 2)), [None, [0, 2, 4], None, None]),
        ((2, 6, 4), lambda x: x.transpose(1, 2).unflatten(-1, (3, -1)), [None, None, None, [0, 1]]),
        ((2, 6, 4), lambda x: torch.reshape(x, (2, -1, 3, 4)), [None, [0, 3], None, None]),
        ((2, 3, 4), lambda x: x[:, :, torch.tensor([0, 1])], [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x[torch.tensor([0, 1]), :, torch.tensor([0, 1])], [None, [0, 1, 2]]),
        ((2, 3, 4, 4), lambda x: x[:, :, torch.tensor([0, 1]), torch.tensor([0, 1])], [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.bmm(x, torch.ones(2, 4, 5)), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.bmm(torch.ones(2, 5, 4), x.transpose(1, 2)), [None, None, [0, 1, 2]]),
        ((2, 3, 4, 4), lambda x: sdpa(x, x, x), [None, [0, 1, 2], None, None]),
        ((2, 3, 4, 4), lambda x: sdpa(x, x, x, attn_mask=torch.ones(4, 4)), [None, [0, 1, 2], None, None]),
        ((2, 3, 4, 4), lambda x: sdpa(x, x, x, attn_mask=x), [None, [0, 1, 2], None, None]),
        ((2, 8, 4, 4), lambda x: F.pixel_shuffle(x, 2), [None, [0, 4], None, None]),
        ((2, 2, 4, 4), lambda x: F.pixel_unshuffle(x, 2), [None, [0] * 4 + [1] * 4, None, None]),
        ((2, 2, 4, 4), lambda x: F.unfold(x, 2), [None, [0] * 4 + [1] * 4, None]),
        ((2, 6, 4, 4), lambda x: F.channel_shuffle(x, 2), [None, [0, 0, 1, 1, 2, 2], None, None]),
        ((2, 3, 4, 4), lambda x: F.grid_sample(x, x.new_zeros(2, 5, 5, 2)), [None, [0, 1, 2], None, None]),
        ((2, 3, 4), lambda x: x.view(6, 4), [[0, 1, 2, 0, 1, 2], None]),
        ((1, 3, 4), lambda x: x.view(3, 4), [[0, 1, 2], None]),
        ((1, 3, 4), lambda x: x.view(3, 4).view(1, 3, 1, 4), [None, [0, 1, 2], None, None]),
        ((2, 3, 4, 5), lambda x: x.flatten(1).view(2, 3, 4, 5), [None, [0, 1, 2], None, None]),
        ((2, 3, 4, 5), lambda x: x.flatten(1).unflatten(1, (3, 20)), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.transpose(1, 2).contiguous(), [None, None, [0, 1, 2]]),
        ((2, 3, 4), lambda x: torch.cat([x, x], 1), [None, [0, 1, 2, 0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.cat([x, x], 2), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.cat([x.new_zeros(0), x], 2), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.cat([x, torch.zeros(2, 1, 4)], 1), [None, [0, 1, 2, -1], None]),
        ((2, 3, 4), lambda x: torch.stack([x, x], 1), [None, None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.repeat(1, 2, 1), [None, [0, 1, 2, 0, 1, 2], None]),
        ((2, 3, 4), lambda x: x[:, :, ::2], [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x[..., 1], [None, [0, 1, 2]]),
        ((2, 3, 4), lambda x: x.unbind(2)[1], [None, [0, 1, 2]]),
        ((2, 3, 4), lambda x: F.pad(x, (1, 1)), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.flip(2).roll(1, 2), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.amax(2, keepdim=True).expand(2, 3, 7), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.max(2).values + x.var(2) + x.std((2,), keepdim=True)[..., 0], [None, [0, 1, 2]]),
        ((2, 3, 4), lambda x: F.softmax(x, 2).cumsum(2).sum(2), [None, [0, 1, 2]]),
        ((2, 3, 4), lambda x: F.normalize(x, dim=2), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: torch.where(x > 0, x, torch.zeros_like(x)).abs(), [None, [0, 1, 2], None]),
        ((2, 3, 4), lambda x: x.mean(1).unsqueeze(1).expand(2, 3, 4), [None, None, None]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Default grid_sample")
def test_labels_that_pass(shape, function, expected):
    dims, frozen = after(x(*shape), 1, function)
    assert dims == expected
    assert bool(frozen) == all(labels is None for labels in expected)


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((2, 4, 6), lambda x: x[:, 1:]),
        ((2, 4, 6), lambda x: x[:, 2]),
        ((2, 4, 6), lambda x: x.index_select(1, torch.tensor([0, 1]))),
        ((2, 4, 6), lambda x: x[:, torch.tensor([0, 1])]),
        ((2, 4, 6), lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 1])]),
        ((2, 4, 6), lambda x: x[x > 0]),
        ((2, 4, 6), lambda x: F.rms_norm(x, (4, 6))),
        ((2, 4, 6), lambda x: x.triu()),
        ((2, 4, 6), lambda x: x.split([1, 3], 1)[0]),
        ((2, 4, 6), lambda x: x.unbind(1)[0]),
        ((2, 4, 6), lambda x: F.pad(x, (0, 0, 1, 1))),
        ((2, 4, 6), lambda x: F.softmax(x, 1)),
        ((2, 4, 6), lambda x: F.normalize(x, dim=1)),
        ((2, 4, 6), lambda x: x.flip(1)),
        ((2, 4, 6), lambda x: x.roll(1)),
        ((2, 4, 6), lambda x: x.var()),
        ((2, 4, 6), lambda x: x.argmax(1)),
        ((2, 4, 6), lambda x: x.topk(2, 1).values),
        ((2, 4, 6), lambda x: x.sort(1).values),
        ((2, 4, 6), lambda x: x + torch.ones(4, 1)),
        ((2, 4, 6), lambda x: torch.cat([x, torch.ones(2, 4, 1)], 2)),
        ((2, 4, 6), lambda x: torch.ones(2, 4, 6).copy_(x)),
        ((2, 4, 6), lambda x: F.layer_norm(x, (6,)) + F.layer_norm(x, (4, 6))),
        ((2, 4, 6, 6), lambda x: F.local_response_norm(x, 3)),
        ((2, 4, 6), lambda x: F.max_pool1d(x.transpose(1, 2), 2)),
        ((2, 4, 6), lambda x: torch.bmm(x.transpose(1, 2), torch.ones(2, 4, 3))),
        ((2, 4, 6), lambda x: torch.baddbmm(torch.ones(2, 4, 3), x, torch.ones(2, 6, 3))),
        ((2, 4, 6, 6), lambda x: sdpa(x.transpose(1, 3), torch.ones(2, 6, 6, 4), torch.ones(2, 6, 6, 5))),
        ((2, 4, 6, 6), lambda x: sdpa(torch.ones(2, 6, 6, 6), torch.ones(2, 6, 4, 6), x.transpose(1, 2))),
        ((2, 4, 6, 6), lambda x: sdpa(x, torch.ones(2, 4, 6, 6), torch.ones(2, 4, 6, 6))),
        ((2, 4, 6, 6), lambda x: sdpa(x, x, x, attn_mask=torch.ones(2, 4, 6, 6))),
        ((2, 4, 6, 6), lambda x: sdpa(*[torch.ones(2, 4, 6, 6)] * 3, attn_mask=x)),
        ((2, 4, 6), lambda x: torch.einsum("nct,cd->ndt", x, torch.ones(4, 3))),
        ((2, 4, 6), lambda x: torch.cdist(x, x)),
        ((2, 1, 6), lambda x: x * torch.ones(2, 4, 6)),
        ((2, 1, 6), lambda x: x.squeeze(1)),
    ],
)
def test_labels_that_are_frozen(shape, function):
    _, frozen = after(x(*shape), 1, function)
    assert frozen == list(range(shape[1]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_blocks_of_a_view(factors, data):
    """Any two ways of grouping the same factors: blocks cover all dimensions in order, with equal products."""

    def grouped() -> list[int]:
        sizes = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    old, new = grouped(), grouped()
    blocks = _blocks(old, new)
    assert [i for before, _ in blocks for i in before] == list(range(len(old)))
    assert [j for _, behind in blocks for j in behind] == list(range(len(new)))
    for before, behind in blocks:
        assert torch.Size(old[i] for i in before).numel() == torch.Size(new[j] for j in behind).numel()


def test_a_rule_that_fails_freezes_like_an_unknown_op(monkeypatch):
    from taylor_cuda.graph import rules

    def failing(flow: Flow, op: Any) -> None:
        raise KeyError("another form")

    monkeypatch.setitem(rules.RULES, "tanh", failing)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))
    with pytest.raises(InputError, match=r"the rule for tanh failed: KeyError: 'another form' \(1\)"):
        trace(model, image())


class Mixer(Net):
    """A layer across tokens: its rows are channels, so its MACs would change without its weight."""

    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(6, 8), up=nn.Linear(5, 7), down=nn.Linear(7, 5), head=nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x.mean(1))


def test_channels_that_are_rows_of_a_layer_stay():
    groups = trace(Mixer(), x(2, 5, 6), prove=False)
    assert groups.sizes() == {"up": 7}
    reasons = {entry.name: entry.reason for entry in groups.frozen}
    assert "the rows of a product" in reasons["embed"]


class Chain(Net):
    """conv, something, conv."""

    def __init__(self, middle: Any, width: int = 8) -> None:
        super().__init__(a=conv(3, 8), b=conv(width, 4), fc=nn.Linear(4, 2))
        self.middle = middle if isinstance(middle, nn.Module) else None
        self.function = None if isinstance(middle, nn.Module) else middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.middle(x) if self.middle is not None else self.function(x)
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm([8, 8, 8]), nn.LayerNorm([8, 8], bias=False), nn.GroupNorm(4, 8, affine=False)]
)
def test_norms_that_masking_cannot_imitate_need_no_proof(norm):
    wide = isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 2
    groups = trace(Chain(norm), image(), prove=False)
    # over space alone, channels are examples: nothing of the norm lies along them
    assert ("a" in groups.sizes()) == wide


@pytest.mark.parametrize(
    ("middle", "width", "offered"),
    [
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8, True),
        (nn.InstanceNorm2d(8), 8, True),
        (nn.BatchNorm2d(8, affine=False), 8, True),
        (nn.BatchNorm2d(8, track_running_stats=False), 8, True),
        (nn.LayerNorm([8, 8, 8]), 8, False),
        (nn.GroupNorm(1, 8), 8, False),
        (nn.GroupNorm(4, 8, affine=False), 8, False),
        (nn.LocalResponseNorm(3), 8, False),
        (nn.Softmax2d(), 8, False),
        (nn.ChannelShuffle(2), 8, True),
        (nn.PixelShuffle(2), 2, True),
        (nn.PixelUnshuffle(2), 32, True),
        (lambda x: F.rms_norm(x.transpose(1, 3), (8,)).transpose(1, 3), 8, False),
        (nn.RMSNorm([8, 8, 8]), 8, False),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 8, True),
        (nn.Upsample(scale_factor=2, mode="bicubic"), 8, True),
        (nn.ReflectionPad2d(1), 8, True),
        (nn.ReplicationPad2d(1), 8, True),
        (nn.ZeroPad2d(1), 8, True),
        (nn.AdaptiveAvgPool2d(3), 8, True),
        (nn.AdaptiveMaxPool2d(3), 8, True),
        (nn.LPPool2d(2, 2), 8, True),
        (nn.Dropout2d(0.5), 8, True),
        (nn.AlphaDropout(0.5), 8, True),
        (nn.Mish(), 8, True),
        (nn.Hardswish(), 8, True),
        (nn.RReLU(), 8, True),
        (nn.GLU(1), 4, True),
        (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), 4, True),
        (lambda x: torch.cat([x, x.flip(3)], 1), 16, True),
        (lambda x: x.clamp(-1, 1).pow(2).sqrt().add(1).log().div(3), 8, True),
        (lambda x: x / x.shape[1], 8, False),
        (lambda x: x.reshape(x.shape[0], x.shape[1], -1).view(x.shape), 8, True),
        (lambda x: x.view(x.shape[0], 8, -1).view(x.shape[0], 8, 8, 8), 8, False),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), 8, False),
        (lambda x: x * torch.linspace(0, 1, 8).view(8, 1, 1), 8, False),
        (lambda x: x * torch.linspace(0, 1, x.shape[1]).view(-1, 1, 1), 8, False),
    ],
)
@pytest.mark.filterwarnings("ignore:input.s size at dim=1 does not match num_features")
def test_what_stands_between_two_convolutions(middle, width, offered):
    torch.manual_seed(0)
    model = Chain(middle, width).eval()
    groups = trace(model, image())
    assert ("a" in groups.sizes()) == offered
    for seed in range(2):
        assert cut_error(model, groups, random_plan(groups, seed)) < 1e-5
