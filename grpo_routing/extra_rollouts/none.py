"""No extra rollouts: the policy learns from what it sampled."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_routing.policy import Policy
from grpo_routing.types import Labels, Rollout


@dataclass(frozen=True)
class NoExtra:
    imitation = False
    groups = 0  # further groups per step

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        return []

    def edit(self, rollouts: list[Rollout], rewards: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
        return rewards, labels
