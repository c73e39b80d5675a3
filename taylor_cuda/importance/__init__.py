"""Groups and gradients in, the importance of every unit out."""

from taylor_cuda.importance.criteria import CRITERIA
from taylor_cuda.importance.estimator import Importance
from taylor_cuda.importance.fused import FusedScoring, fuse_scoring

__all__ = ["CRITERIA", "FusedScoring", "Importance", "fuse_scoring"]
