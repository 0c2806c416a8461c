"""Optimizers: what turns a step's routed gradients into a step of the parameters, block by block."""

from grpo_routing.optimizers.adamw import AdamW
from grpo_routing.optimizers.optimizer import Optimizer
from grpo_routing.optimizers.split_moment import SplitMoment

OPTIMIZERS = {"adamw": AdamW, "split_moment": SplitMoment}
__all__ = ["OPTIMIZERS", "AdamW", "Optimizer", "SplitMoment"]
