"""Score every channel of a network while it trains, cut the worthless ones for real, and prove that the rest is what was asked for."""

from __future__ import annotations

from importlib.metadata import version

from taylor_cuda import ops

__version__ = version("taylor-cuda")

__all__ = ["__version__", "ops"]
