"""Screening (Wong, Engels & Nanda 2025; baselines.md A3): flagged rollouts leave the group, statistics are of those that are left.

    K = unflagged members;   A_i = (R_i - mean_K) / (std_K + floor) for i in K, 0 for the others;   all 0 when fewer than two are left

scale: sample (the paper's: std-GRPO over K) or none (Dr.GRPO's mean alone). A soft flag of 0.5 or more screens. The loss' denominator
stays that of the whole step, and with a KL penalty screened rollouts keep theirs: both are choices that the paper leaves open.
Differs from `projection=erase` with `advantage=balanced` by the scale and by groups with one rollout left, which train nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Screening:
    scale: str
    floor: float  # added to the standard deviation
    reads = ("flags",)
    two_streams = False
    flat_is_zero = True

    def __post_init__(self) -> None:
        if self.scale not in ("none", "sample"):
            raise ValueError(f"advantage.scale must be none or sample; got {self.scale!r}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        kept = (flagged < 0.5).to(rewards)
        count = kept.sum(1, keepdim=True)
        centred = kept * (rewards - (kept * rewards).sum(1, keepdim=True) / count.clamp_min(1))
        if self.scale == "sample":
            spread = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt() + self.floor
            centred = centred / spread.clamp_min(1e-12)
        return torch.where(count >= 2, centred, torch.zeros_like(rewards))
