"""No mask source: nothing is marked, nothing is measured along a direction."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.mask_sources.view import Memory, StepView, unknown
from grpo_routing.types import Labels


@dataclass(frozen=True)
class NoSource:
    kind = "none"
    kinds = ("none",)
    control = "none"
    reads = ()
    pilot_batches = 0
    uses_oracle = needs_quarantine = needs_coordinates = False

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        return unknown(view), memory

    def facts(self, memory: Memory) -> dict[str, float]:
        return {}
