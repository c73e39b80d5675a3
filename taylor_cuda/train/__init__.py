"""A training run around the pruner: models and data by name, the loop, the recipe of ``taylor-cuda prune``."""

from taylor_cuda.train.batch_norm import recalibrate_batch_norm
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.loop import evaluate
from taylor_cuda.train.models import load_model
from taylor_cuda.train.pruning import run
from taylor_cuda.train.summary import Summary

__all__ = ["RunConfig", "Summary", "evaluate", "load_model", "recalibrate_batch_norm", "run"]
