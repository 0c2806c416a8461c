"""GRPO (Shao et al. 2024, arXiv:2402.03300): A = (R - mean) / (std + floor) of the group, sample standard deviation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grpo:
    floor: float  # added to the standard deviation; the benchmark uses 1e-6 (baselines.md A2)
    reads = ()  # labels change nothing here
    two_streams = False
    flat_is_zero = True

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        centred = rewards - rewards.mean(1, keepdim=True)
        return centred / (rewards.std(1, keepdim=True) + self.floor)
