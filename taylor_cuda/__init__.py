"""Prune networks by Taylor importance: score every channel while the network trains, cut the worthless ones."""

from importlib.metadata import PackageNotFoundError, version

from taylor_cuda import integrations
from taylor_cuda.errors import BudgetError, CheckpointError, CutError, InputError, TaylorError
from taylor_cuda.graph import ChannelGroup, Groups, masked, trace
from taylor_cuda.importance import Importance, fuse_scoring
from taylor_cuda.ops import (
    BatchNormReLU,
    ScoreGate,
    ScoreReLU,
    batch_norm_relu,
    channel_importance,
    channel_sums,
    keep_lists,
    keep_mask,
    masked_conv2d,
    pack_channels,
    score_gate,
    score_relu,
    unpack_channels,
    weight_importance,
)
from taylor_cuda.planning import Plan, plan
from taylor_cuda.pruner import Pruner
from taylor_cuda.study import combinatorial_oracle, compare, greedy_oracle, oracle, sensitivity
from taylor_cuda.surgery import compact, cut, load, save
from taylor_cuda.watched import watch

try:
    __version__ = version("taylor-cuda")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "BatchNormReLU",
    "BudgetError",
    "ChannelGroup",
    "CheckpointError",
    "CutError",
    "Groups",
    "Importance",
    "InputError",
    "Plan",
    "Pruner",
    "ScoreGate",
    "ScoreReLU",
    "TaylorError",
    "batch_norm_relu",
    "channel_importance",
    "channel_sums",
    "combinatorial_oracle",
    "compact",
    "compare",
    "cut",
    "fuse_scoring",
    "greedy_oracle",
    "integrations",
    "keep_lists",
    "keep_mask",
    "load",
    "masked",
    "masked_conv2d",
    "oracle",
    "pack_channels",
    "plan",
    "save",
    "score_gate",
    "score_relu",
    "sensitivity",
    "trace",
    "unpack_channels",
    "watch",
    "weight_importance",
]
