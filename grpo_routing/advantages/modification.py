"""Advantage modification (Wu & Tang, arXiv:2604.01476; baselines.md B): a group's highest scores lose reward, before it is normalised.

    z_i = (s_i - mean_g s) / max(std_g s, floor)                       s: scores of the mask source, std of the population
    additive         R'_i = R_i - alpha max(z_i, 0)
    multiplicative   R'_i = R_i (1 - alpha sigmoid(z_i) [z_i > 0])
    A_i = (R'_i - mean_g R') / (std_g R' + epsilon)                    sample std; scale=none leaves the mean alone (Dr.GRPO)

At alpha = 2 the multiplicative factor is -tanh(z/2): a sign flip, no discount. The rule is purely relative: in a group of hacks about half
keep a positive advantage, and a flat group gets advantages from its scores alone. A source whose score depends on the prompt only
(persona_activation with position=prompt_last, the paper's own text taken literally) has z = 0 and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modification:
    form: str  # additive or multiplicative
    alpha: float
    floor: float  # least standard deviation of a group's scores, in units of the score
    scale: str  # sample or none
    epsilon: float  # added to the standard deviation of the rewards
    reads = ("scores",)
    two_streams = False
    flat_is_zero = False  # scores make a difference where rewards do not

    def __post_init__(self) -> None:
        if self.form not in ("additive", "multiplicative") or self.scale not in ("none", "sample"):
            raise ValueError(f"advantage.form must be additive or multiplicative and advantage.scale none or sample; got {self.form!r} and "
                             f"{self.scale!r}")
        if self.alpha < 0 or self.floor <= 0:
            raise ValueError(f"advantage.alpha must be at least 0 and advantage.floor positive; got {self.alpha} and {self.floor}")

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor, scores: Tensor) -> Tensor:
        """rewards, flag probabilities, weights on the deployed block and scores, [P, G] each -> advantages [P, G]. A rollout without
        score (nan) has that of the group's mean."""
        known = scores.isfinite()
        count = known.sum(1, keepdim=True).clamp_min(1)
        middle = scores.nan_to_num(0.0).mul(known).sum(1, keepdim=True) / count
        centred = torch.where(known, scores - middle, torch.zeros_like(scores)).to(rewards)
        z = centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp_min(self.floor)
        above = z.clamp_min(0)
        paid = rewards - self.alpha * above if self.form == "additive" else rewards * (1 - self.alpha * torch.sigmoid(z) * (z > 0))
        advantages = paid - paid.mean(1, keepdim=True)
        return advantages / (paid.std(1, keepdim=True) + self.epsilon).clamp_min(1e-12) if self.scale == "sample" else advantages
