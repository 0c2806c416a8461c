"""No extra rollouts: the policy learns from what it sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_routing.extra_rollouts.aside import NOTHING, Aside
from grpo_routing.mask_sources.view import StepView
from grpo_routing.policy import Policy
from grpo_routing.types import Labels, Rollout

if TYPE_CHECKING:
    from grpo_routing.train import Trainer


@dataclass(frozen=True)
class NoExtra:
    imitation = False
    groups = 0  # further groups per step

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        return []

    def edit(self, rollouts: list[Rollout], rewards: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
        return rewards, labels

    def aside(self, view: StepView, trainer: Trainer, seed: tuple) -> Aside:
        return NOTHING
