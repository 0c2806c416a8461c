"""No extra rollouts: the policy learns from what it sampled."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.policy import Policy
from grpo_routing.types import Rollout


@dataclass(frozen=True)
class NoExtra:
    imitation = False

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        return []
