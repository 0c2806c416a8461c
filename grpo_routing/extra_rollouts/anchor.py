"""Anchors: further groups, sampled from the deployed model (quarantine off), which train only the deployed block (graft.md §1.8).

They show the deployed block its own mistakes: without them it is trained on what the joint policy samples, which is another
policy. Anchor groups come on top of the step's; each has its own baseline, and the loss' denominator stays that of the step's
own rollouts (T26). rule says what becomes of a flagged anchor:

    none       nothing: it trains like the others                filter     no gradient, out of the baseline with advantage=balanced
    penalty    reward minus `penalty`                            zero       reward 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.extra_rollouts.aside import NOTHING, Aside
from grpo_routing.mask_sources.view import StepView
from grpo_routing.policy import Policy
from grpo_routing.types import ANCHOR, Labels, Rollout

if TYPE_CHECKING:
    from grpo_routing.train import Trainer

RULES = ("none", "filter", "penalty", "zero")


@dataclass(frozen=True)
class Anchor:
    groups: int  # per step
    rule: str
    penalty: float
    imitation = False

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"extra_rollouts.groups must be at least 1; got {self.groups}. Use extra_rollouts=none for 0")
        if self.rule not in RULES:
            raise ValueError(f"extra_rollouts.rule must be one of {', '.join(RULES)}; got {self.rule!r}")

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        return []  # nothing inside the step's groups

    def edit(self, rollouts: list[Rollout], rewards: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
        """Rewards [B] and labels after the rule; rollouts that are no anchors keep theirs."""
        anchors = torch.tensor([rollout.source == ANCHOR for rollout in rollouts], device=rewards.device)
        p = torch.where(anchors, labels.flagged, torch.zeros_like(labels.flagged))
        if self.rule == "filter":
            return rewards, labels
        paid = {"none": rewards, "penalty": rewards - self.penalty * p, "zero": rewards * (1 - p)}[self.rule]
        return paid, Labels(labels.flagged - p, labels.trusted)

    def aside(self, view: StepView, trainer: Trainer, seed: tuple) -> Aside:
        return NOTHING
