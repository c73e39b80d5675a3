"""Triton kernels, one file an op, each with the op's own signature. Importing this imports neither torch nor triton."""

from __future__ import annotations

MODULE_OF_OP: dict[str, str] = {
    "accumulate_channel_sums": "taylor_cuda.kernels.accumulate_channel_sums",
    "channel_importance": "taylor_cuda.kernels.channel_importance",
    "channel_sums": "taylor_cuda.kernels.channel_sums",
    "score_relu_backward": "taylor_cuda.kernels.score_relu_backward",
    "batch_norm_relu_forward": "taylor_cuda.kernels.batch_norm_relu",
    "batch_norm_relu_backward": "taylor_cuda.kernels.batch_norm_relu",
    "masked_conv2d_forward": "taylor_cuda.kernels.masked_conv2d",
    "masked_conv2d_backward": "taylor_cuda.kernels.masked_conv2d",
}
