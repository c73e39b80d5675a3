"""Importance and a budget in, a plan out."""

from taylor_cuda.planning.budget import parse_budget
from taylor_cuda.planning.cost import Cost, model_cost, original_cost
from taylor_cuda.planning.layers import LayerCost, layer_costs
from taylor_cuda.planning.planner import Plan, native_planner, plan
from taylor_cuda.planning.schedule import budgets_at

__all__ = [
    "Cost",
    "LayerCost",
    "Plan",
    "budgets_at",
    "layer_costs",
    "model_cost",
    "native_planner",
    "original_cost",
    "parse_budget",
    "plan",
]
