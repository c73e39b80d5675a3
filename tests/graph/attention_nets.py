"""Attention as people write it: what the code leaves open, counts in an attribute, or holds as a number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.base import Net


class OpenHeads(Net):
    """Query, key and value in one layer, ``reshape(…, 3, -1, 4)``: as many heads as there are."""

    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(6, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 7), head=nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.proj(x)).mean(1))


class CountedHeads(Net):
    """Three layers, a bias for every head, and attributes that say how many there are and how wide all of them."""

    def __init__(self) -> None:
        super().__init__(
            q=nn.Linear(6, 15), k=nn.Linear(6, 15), v=nn.Linear(6, 15), proj=nn.Linear(15, 7), head=nn.Linear(7, 2)
        )
        self.bias = nn.Parameter(torch.randn(3, 1, 1))
        self.num_heads, self.head_dim, self.attn_dim = 3, 5, 15

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (layer(x).view(n, tokens, self.num_heads, self.head_dim) for layer in (self.q, self.k, self.v))
        bias = self.bias * torch.arange(tokens)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
        return self.head(F.relu(self.proj(x.transpose(1, 2).reshape(n, tokens, self.attn_dim))).mean(1))


class FusedHeads(Net):
    """As many heads as there are of query, key and value: ``reshape(…, 3, 3, 4)``."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(6, 36), proj=nn.Linear(12, 2))
        self.num_heads = 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


class HeadsByHand(Net):
    """Products, softmax, and a bias for every head and distance, looked up in a table."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 20), proj=nn.Linear(20, 2))
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).unflatten(2, (-1, 5)).transpose(1, 2)
        at = torch.arange(x.shape[1])
        bias = self.table[(at[:, None] - at + 4).view(-1)].view(x.shape[1], x.shape[1], -1).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) * 3**-0.5 + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)).mean(1)


class FixedHeads(Net):
    """``view(n, tokens, 3, 4)``: numbers that the code holds."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(6, 36), up=nn.Linear(12, 7), head=nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(*x.shape[:2], 3, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.up(x)).mean(1))


class WidthFromInput(Net):
    """Counts its heads, but takes their width from what it is given: no head can go."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12), up=nn.Linear(12, 7), head=nn.Linear(7, 2))
        self.num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, c = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, c))
        return self.head(F.relu(self.up(x)).mean(1))
