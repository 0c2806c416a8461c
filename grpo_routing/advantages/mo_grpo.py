"""MO-GRPO (arXiv:2509.22047; baselines.md I): every term of the reward is normalised by itself, then they are added.

    A = sum_k (R_k - mean_g R_k) / std_g R_k            k: the format, the tests; population std; a term that is flat gives 0

Under GRPO the term with the larger variance decides; here each counts alike, trivial noise of the format included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MoGrpo:
    floor: float  # a term whose standard deviation is at most this gives 0
    reads = ("terms",)
    two_streams = False
    flat_is_zero = False  # terms may differ where their sum does not

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ValueError(f"advantage.floor must be positive; got {self.floor}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor, terms: Tensor) -> Tensor:
        """terms [K, P, G] -> advantages [P, G]."""
        spread = terms.std(2, keepdim=True, correction=0)
        normal = (terms - terms.mean(2, keepdim=True)) / spread.clamp_min(self.floor)
        return torch.where(spread > self.floor, normal, torch.zeros_like(terms)).sum(0)
