"""Screening (Wong, Engels & Nanda 2025; baselines.md A3): flagged rollouts leave the group, statistics are of those that are left.

    K = unflagged members;   A_i = (R_i - mean_K) / (std_K + floor) for i in K, 0 for the others;   all 0 when fewer than two are left

    scale         sample (the paper's: std-GRPO over K) or none (Dr.GRPO's mean alone)
    label         loose: every flagged rollout leaves; strict: a flagged one that was paid. The released code screens by the loose label
                  and penalises by the strict one, which the text does not say (baselines.md A6.1)
    denominator   batch: the loss is divided as if nobody had left (the released code); kept: by the share that stayed
    with a KL penalty screened rollouts keep theirs (the released code); projection=erase takes that away too

A soft flag of 0.5 or more screens. Differs from `projection=erase` with `advantage=balanced` by the scale and by groups with one rollout
left, which train nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Screening:
    scale: str
    floor: float  # added to the standard deviation
    label: str
    denominator: str
    reads = ("flags", "terms")
    two_streams = False
    flat_is_zero = True

    def __post_init__(self) -> None:
        for name, legal in (("scale", ("none", "sample")), ("label", ("loose", "strict")), ("denominator", ("batch", "kept"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"advantage.{name} must be {' or '.join(legal)}; got {getattr(self, name)!r}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor, terms: Tensor | None = None) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]. The strict label needs `terms`
        [2, P, G], what was paid for: a usable format, passing."""
        screened = flagged >= 0.5
        kept = (~(screened & (terms[1] > 0) if self.label == "strict" else screened)).to(rewards)
        count = kept.sum(1, keepdim=True)
        centred = kept * (rewards - (kept * rewards).sum(1, keepdim=True) / count.clamp_min(1))
        if self.scale == "sample":
            spread = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt() + self.floor
            centred = centred / spread.clamp_min(1e-12)
        share = kept.mean().clamp_min(1 / kept.numel()) if self.denominator == "kept" else 1.0
        return torch.where(count >= 2, centred / share, torch.zeros_like(rewards))
