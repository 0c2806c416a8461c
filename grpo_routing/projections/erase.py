"""Erase: the hack-ward part is dropped (grpo_proj2's projection; routing.md §0.1 tells it from TDGA's).

    where: gradient    g <- g - removed(g), then the optimizer
    where: step        the optimizer first, then  u <- u - removed(u)  on the applied step u

AdamW does not respect a projection: a gradient with overlap 1e-8 gives a step with overlap 2e-2, hence `step`.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.projections.subspace import Update, Vector, check_settings, split
from grpo_routing.types import Basis


@dataclass(frozen=True)
class Erase:
    where: str  # gradient or step
    gate: str  # one_sided, no_gate or reverse
    overshoot: float  # 1 removes the part, more reverses it
    preserve_magnitude: bool  # rescale what is kept to the norm of the whole
    takes = ("subspace",)
    needs_quarantine = False

    def __post_init__(self) -> None:
        check_settings(self.where, self.gate, self.overshoot)

    def gradient(self, gradient: Vector, basis: Basis) -> Update:
        return {DEPLOYED: self._kept(gradient, basis) if self.where == "gradient" else gradient}

    def step(self, applied: Update, basis: Basis) -> Update:
        return applied if self.where == "gradient" else {DEPLOYED: self._kept(applied[DEPLOYED], basis)}

    def _kept(self, vector: Vector, basis: Basis) -> Vector:
        return split(vector, basis, self.gate, self.overshoot, self.preserve_magnitude).kept
