"""The oracle: flags what really hacks, held-out loopholes included. A ceiling for every mask, and no method.

Cheats on purpose: the run must say `uses_oracle: true`, which stamps everything that it leaves behind. Nothing else can read a
verdict: for any other run the view carries none.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.mask_sources.source import MaskSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import Labels


@dataclass(frozen=True)
class Ceiling(MaskSource):
    reads = ("truth",)
    uses_oracle = True

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        if view.ceiling is None:
            raise RuntimeError("mask_source=ceiling was given no oracle; the run must say uses_oracle=true")
        return Labels.of(view.ceiling().to(view.rewards)), memory
