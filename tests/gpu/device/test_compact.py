"""Compact models and the pruner's modes on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu


class Small(nn.Module):
    """A residual stream and an inner convolution, wide enough for cuDNN's tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.a, self.abn = nn.Conv2d(64, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96)
        self.b, self.bbn = nn.Conv2d(96, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bbn(self.b(F.relu(self.abn(self.a(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def start() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Small().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(32, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    return model, x, torch.randint(0, 10, (32,), device="cuda")


def random_keep(groups: tc.Groups, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randperm(g.size, generator=generator)[: g.size // 3].sort().values for g in groups}


@pytest.mark.parametrize("half", [False, True])
def test_compact_computes_what_the_cut_model_computes(half: bool) -> None:
    model, x, y = start()
    groups = tc.trace(model, x[:2])
    keep = random_keep(groups)
    small, its_groups = copy.deepcopy(model), copy.deepcopy(groups)
    tc.cut(small, its_groups, keep)
    losses = []
    tc.compact(model, groups, keep, round_to=1)
    for one in (model, small):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(one(x), y)
        loss.backward()
        losses.append(loss.detach())
    # the same convolutions of the same numbers
    assert torch.equal(*losses)
    expected = dict(small.named_parameters())
    gradient = model.a.weight.grad
    assert torch.equal(gradient[keep["a"]][:, keep["stem"]], expected["a.weight"].grad)
    assert gradient.count_nonzero() == expected["a.weight"].grad.count_nonzero()


def test_zeros_fill_the_tiles_and_change_nothing() -> None:
    model, x, _ = start()
    groups = tc.trace(model, x[:2])
    keep = random_keep(groups)
    widths = []
    handle = model.a.register_forward_hook(lambda _module, args, _output: widths.append(args[0].shape[1]))
    with tc.compact(model, groups, keep) as compacted:
        assert compacted.verified is not None
        assert compacted.verified <= 1e-4
        model(x)
    handle.remove()
    assert widths[-1] == 32
    assert keep["stem"].numel() == 21


def test_gradients_where_zeros_run_among_kept_channels() -> None:
    model, x, y = start()
    groups = tc.trace(model, x[:2])
    keep = random_keep(groups)
    small, its_groups = copy.deepcopy(model), copy.deepcopy(groups)
    tc.cut(small, its_groups, keep)
    tc.compact(model, groups, keep, round_to=16)
    for one in (model, small):
        F.cross_entropy(one(x), y).backward()
    expected = small.a.weight.grad
    whole = torch.zeros_like(model.a.weight)
    whole[keep["a"][:, None].cuda(), keep["stem"].cuda()] = expected
    assert (model.a.weight.grad - whole).abs().max() <= 1e-4 * expected.abs().max()
    assert not model.a.weight.grad[whole == 0].any()


def test_a_step_waits_for_nothing() -> None:
    model, x, y = start()
    groups = tc.trace(model, x[:2])
    tc.compact(model, groups, random_keep(groups))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_modes_train_alike() -> None:
    runs = {}
    for mode in ("cut", "compact", "mask"):
        model, x, y = start()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        pruner = tc.Pruner(model, x[:2], optimizer, every=2, steps=2, mode=mode, round_to=8)
        losses = []
        for _ in range(6):
            loss = F.cross_entropy(model(x), y)
            pruner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            losses.append(loss.detach())
        pruner.finish()
        runs[mode] = torch.stack(losses), [p.shape for p in model.parameters()]
    for mode in ("compact", "mask"):
        assert (runs[mode][0] - runs["cut"][0]).abs().max() <= 1e-3
        assert runs[mode][1] == runs["cut"][1]
