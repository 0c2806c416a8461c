"""Reward penalty (Wong, Engels & Nanda 2025; baselines.md A, graft.md §1.4): R - P p before the group's mean, nothing else.

The strongest realistic baseline of the same imperfect monitor. P above pass_reward / recall makes a hack a loss in
expectation; below that it still pays.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Penalty:
    penalty: float  # P, in units of reward
    reads_flags = True
    two_streams = False
    flat_is_zero = False  # flags make a difference where rewards do not

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError(f"advantage.penalty must be positive; got {self.penalty}. Use advantage=dr_grpo for none")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        paid = rewards - self.penalty * flagged
        return paid - paid.mean(1, keepdim=True)
