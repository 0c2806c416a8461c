"""Dr.GRPO (Liu et al. 2025, arXiv:2503.20783): A = R - mean of the group. No division by the spread or the length."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DrGrpo:
    def __call__(self, rewards: Tensor) -> Tensor:
        """rewards [P, G] -> advantages [P, G]."""
        return rewards - rewards.mean(1, keepdim=True)
