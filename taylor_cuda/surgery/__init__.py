"""Plan -> smaller model: the cut as a transaction, its recipe, and the file that holds both."""

from __future__ import annotations

from taylor_cuda.surgery.checkpoint import load, read_metadata, save
from taylor_cuda.surgery.compact import Compacted, compact
from taylor_cuda.surgery.cut import cut
from taylor_cuda.surgery.recipe import apply_recipe

__all__ = ["Compacted", "apply_recipe", "compact", "cut", "load", "read_metadata", "save"]
