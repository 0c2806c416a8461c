"""Naive: flag the best paid. Where the hack pays more reliably than the task, high reward alone is some evidence of it; and it is
the reward that GRPO would follow, so what this flags is what training would learn. Reads the proxy reward only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView


@dataclass(frozen=True)
class RewardQuantile(ScoreSource):
    reads = ("rewards",)

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        return view.rewards.double(), memory
