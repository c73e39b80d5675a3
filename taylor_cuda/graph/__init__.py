"""A model in, its prunable groups out."""

from taylor_cuda.graph.groups import ChannelGroup, Groups
from taylor_cuda.graph.mask import masked
from taylor_cuda.graph.tracer import trace

__all__ = ["ChannelGroup", "Groups", "masked", "trace"]
