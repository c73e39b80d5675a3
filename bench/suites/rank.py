"""The mask of the largest scores of a network, without asking the host."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from taylor_cuda import ops
from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.peers import our_names, our_providers

OP = "keep_mask"
SIZES = {"resnet50": 11_392, "resnet101": 20_096, "64Ki": 65_536}
"""Channels that can go."""


def topk_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """The mask by the order of those that stay."""
    kept = scores.topk(keep, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, kept, True)


def above_the_kth(scores: Tensor, keep: int) -> Tensor:
    """The mask by the smallest score that stays; of equal ones it keeps all."""
    return scores >= scores.kthvalue(scores.numel() - keep + 1).values


def build(key: Key, options: Options) -> Race:
    """The race for one number of scores; half of them stay."""
    size = SIZES.get(key.case, 1000)
    keep = size // 2
    generator = torch.Generator().manual_seed(0)
    # All different, so that every way of treating equal ones is right; spread over decades, as scores are.
    inputs = [(6 * torch.randperm(size, generator=generator) / size).exp().to(options.device) for _ in range(4)]
    masks = [scores >= scores.sort(descending=True).values[keep - 1] for scores in inputs]
    assert all(int(mask.sum()) == keep for mask in masks)
    count = torch.tensor(keep, device=options.device)

    def check(mask: Tensor, index: int) -> float:
        return 0.0 if torch.equal(mask, masks[index]) else float("inf")

    providers, skipped = our_providers(OP, options, lambda scores: ops.keep_mask(scores, count)[0], check)
    providers.append(Provider("torch.topk", lambda scores: topk_and_scatter(scores, keep), check))
    providers.append(Provider("torch.kthvalue", lambda scores: above_the_kth(scores, keep), check))
    # So few bytes that a copy rate says nothing.
    return Race(key, providers, inputs, peer="torch.topk", skipped=skipped, timers=("graph", "eager"), rounds=30)


def entries(options: Options) -> list[Entry]:
    """The numbers of channels of the residual networks, and the most that one launch takes."""
    names = (*our_names(OP, options), "torch.topk", "torch.kthvalue")
    cases = ["tiny"] if options.quick else list(SIZES)
    made = partial(build, options=options)
    return [
        Entry(Key("rank", OP, case, layout="scores"), made, names, 13 if options.cuda else 56, 2.0) for case in cases
    ]
