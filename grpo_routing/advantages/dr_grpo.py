"""Dr.GRPO (Liu et al. 2025, arXiv:2503.20783): A = R - mean of the group. No division by the spread or the length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DrGrpo:
    reads = ()  # labels change nothing here
    two_streams = False  # one advantage feeds both moments of the optimizer
    flat_is_zero = True  # a group whose rewards are all equal has no gradient, whatever its labels

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        return rewards - rewards.mean(1, keepdim=True)
