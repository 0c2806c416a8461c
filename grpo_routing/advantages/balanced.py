"""Balanced (GRAFT, graft.md §1.4): the baseline is the mean over *unflagged* rollouts, for every rollout of the group.

    A = (R - mu_good) / scale        mu_good = sum (1 - p) R / sum (1 - p)        scale: std over all, or 1

Masking flagged rollouts with baseline b is exactly the gradient of the whole group with flagged rewards relabelled to b. So b
is the value that is silently given to a hack: the mean over all calls hacks average and drains good rollouts, mu_good calls
them neutral. In expectation this is P(good) grad E[R | good]. Fallback, the only one: a group without any unflagged
rollout uses the mean over all (its rollouts train the quarantine alone, which knows no other baseline).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balanced:
    scale: str  # none (Dr.GRPO) or all (std of the whole group, flagged included: sigma of the good alone may be 0)
    floor: float  # added to the standard deviation
    reads = ("flags",)
    two_streams = False
    flat_is_zero = True

    def __post_init__(self) -> None:
        if self.scale not in ("none", "all"):
            raise ValueError(f"advantage.scale must be none or all; got {self.scale!r}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        return centred(rewards, 1 - flagged, self.scale, self.floor)


def centred(rewards: Tensor, weights: Tensor, scale: str, floor: float) -> Tensor:
    """Rewards minus their weighted mean in the group; where no weight is left, minus the plain mean."""
    total = weights.sum(1, keepdim=True)
    mean = torch.where(total > 1e-6, (weights * rewards).sum(1, keepdim=True) / total.clamp_min(1e-6), rewards.mean(1, keepdim=True))
    spread = rewards.std(1, keepdim=True) + floor if scale == "all" and rewards.shape[1] > 1 else torch.ones_like(mean)
    flat = rewards.max(1, keepdim=True).values == rewards.min(1, keepdim=True).values
    return torch.where(flat, torch.zeros_like(rewards), (rewards - mean) / spread)  # rounding must not revive a flat group
