"""Weighted (GRAFT's two streams for lambda != 1, graft.md §1.4-1.5):

    a_m = (R - sum w_D R / sum w_D) / scale      feeds the first moment: sum w_D a_m = 0 in every group, for every lambda
    a_v = balanced                               feeds the second moment

w_D is a rollout's weight on the deployed block. Both come from one backward, of advantage 1. For hard flags and lambda = 1 a_m =
a_v. Needs `optimizer=split_moment`, which alone has two streams. Fallback as in balanced.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_routing.advantages.balanced import centred


@dataclass(frozen=True)
class Weighted:
    scale: str  # none or all
    floor: float
    reads = ("flags",)
    two_streams = True
    flat_is_zero = True

    def __post_init__(self) -> None:
        if self.scale not in ("none", "all"):
            raise ValueError(f"advantage.scale must be none or all; got {self.scale!r}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> a_m [P, G]."""
        return centred(rewards, deployed, self.scale, self.floor)

    def natural(self, rewards: Tensor, flagged: Tensor) -> Tensor:
        """a_v [P, G]."""
        return centred(rewards, 1 - flagged, self.scale, self.floor)
