"""Is the estimate right? What removing channels really does to the loss, and how estimates agree with it."""

from taylor_cuda.study.compare import compare
from taylor_cuda.study.comparison import Comparison
from taylor_cuda.study.cost import OracleCost, oracle_cost
from taylor_cuda.study.oracle import oracle
from taylor_cuda.study.searches import combinatorial_oracle, greedy_oracle
from taylor_cuda.study.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Comparison",
    "OracleCost",
    "Sensitivity",
    "combinatorial_oracle",
    "compare",
    "greedy_oracle",
    "oracle",
    "oracle_cost",
    "sensitivity",
]
