"""Route a subspace: the hack-ward part of the summed gradient trains the quarantine, which deployment deletes (the seeds' `route`).

The adapter needs a quarantine block in the same coordinates (svd: dS_hack beside dS). In the forward both blocks add
up; what was parked is gone when it is deployed.

    where: step        the parted step adds up to vanilla's, so with both blocks on the policy moves exactly as vanilla's
    where: gradient    the seeds' way: AdamW normalises each block by itself, so a parked tenth of the gradient steps as
                       far as the rest, and what is deleted at deployment is larger than what was found
Departure from Cloud et al. 2024 and SGTM: those route whole examples by label (projection=route); here a fixed subspace of
the summed gradient is routed, without any label.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.projections.projection import Projection
from grpo_routing.projections.subspace import Update, Vector, check_settings, split
from grpo_routing.types import Basis


@dataclass(frozen=True)
class RouteSubspace(Projection):
    where: str  # gradient or step
    gate: str  # one_sided, no_gate or reverse
    overshoot: float
    preserve_magnitude: bool
    takes = ("subspace",)
    needs_quarantine = True
    needs_shared_axes = True

    def __post_init__(self) -> None:
        check_settings(self.where, self.gate, self.overshoot)

    def gradient(self, update: Update, basis: Basis) -> Update:
        return self._parted(update[DEPLOYED], basis) if self.where == "gradient" else update

    def step(self, applied: Update, basis: Basis) -> Update:
        return applied if self.where == "gradient" else self._parted(applied[DEPLOYED], basis)

    def _parted(self, vector: Vector, basis: Basis) -> Update:
        parts = split(vector, basis, self.gate, self.overshoot, self.preserve_magnitude)
        return {DEPLOYED: parts.kept, QUARANTINE: parts.removed}
