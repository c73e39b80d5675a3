"""Is the estimate right? The change of the loss that removing channels really makes."""

from taylor_cuda.study.oracle import oracle
from taylor_cuda.study.searches import combinatorial_oracle, greedy_oracle

__all__ = ["combinatorial_oracle", "greedy_oracle", "oracle"]
