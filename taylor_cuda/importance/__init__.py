"""Groups and gradients in, the importance of every unit out."""

from taylor_cuda.importance.criteria import CRITERIA
from taylor_cuda.importance.estimator import Importance

__all__ = ["CRITERIA", "Importance"]
