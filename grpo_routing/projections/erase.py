"""Erase: the hack-ward part is dropped.

A subspace source (grpo_proj2's projection; routing.md §0.1 tells it from TDGA's):

    where: gradient    g <- g - removed(g), then the optimizer
    where: step        the optimizer first, then  u <- u - removed(u)  on the applied step u

AdamW does not respect a projection: a gradient with overlap 1e-8 gives a step with overlap 2e-2, hence `step`.

A rollout source: flagged rollouts lose their gradient, w = 1 - p, which is filtering. They stay in their group's mean
unless `advantage=balanced` takes them out (baselines.md A: filtering changes the baseline too, graft.md §1.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, Adapter
from grpo_routing.projections.projection import Projection, kept
from grpo_routing.projections.subspace import Update, Vector, check_settings, split
from grpo_routing.types import Basis, Labels, Weights


@dataclass(frozen=True)
class Erase(Projection):
    where: str  # gradient or step
    gate: str  # one_sided, no_gate or reverse
    overshoot: float  # 1 removes the part, more reverses it
    preserve_magnitude: bool  # rescale what is kept to the norm of the whole
    takes = ("subspace", "rollout")

    def __post_init__(self) -> None:
        check_settings(self.where, self.gate, self.overshoot)

    def weights(self, labels: Labels, quarantine: Tensor, adapter: Adapter, group: int) -> Weights:
        return Weights(kept(labels), torch.zeros_like(labels.flagged))

    def gradient(self, update: Update, basis: Basis | None) -> Update:
        return self._without(update, basis) if self.where == "gradient" else update

    def step(self, applied: Update, basis: Basis | None) -> Update:
        return self._without(applied, basis) if self.where == "step" else applied

    def _without(self, update: Update, basis: Basis | None) -> Update:
        return update if basis is None else {DEPLOYED: self._kept(update[DEPLOYED], basis)}

    def _kept(self, vector: Vector, basis: Basis) -> Vector:
        return split(vector, basis, self.gate, self.overshoot, self.preserve_magnitude).kept
