"""Reward penalty (Wong, Engels & Nanda 2025; baselines.md A3, graft.md §1.4): R minus a penalty on flags, before the group's mean.

    threshold              P where p >= threshold
    progressive            P p
    threshold_progressive  P (0.5 + 0.5 (p - threshold) / (1 - threshold)), below the threshold too, as in the released code

The strongest realistic baseline of the same imperfect monitor; p is the flag probability of any mask source. P above pass_reward /
recall makes a hack a loss in expectation; up to there it earns no less than a failure, and building such a run warns (build.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FORMS = ("threshold", "progressive", "threshold_progressive")


@dataclass(frozen=True)
class Penalty:
    penalty: float  # P, in units of reward
    form: str
    threshold: float
    scale: str  # none (Dr.GRPO) or sample (std-GRPO)
    reads = ("flags",)
    two_streams = False
    flat_is_zero = False  # flags make a difference where rewards do not

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError(f"advantage.penalty must be positive; got {self.penalty}. Use advantage=dr_grpo for none")
        if self.form not in FORMS or self.scale not in ("none", "sample"):
            raise ValueError(f"advantage.form must be one of {', '.join(FORMS)} and advantage.scale none or sample; got {self.form!r} and "
                             f"{self.scale!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"advantage.threshold must lie in [0, 1); got {self.threshold}")

    def charge(self, flagged: Tensor) -> Tensor:
        """What flag probabilities cost, in units of P."""
        if self.form == "threshold":
            return (flagged >= self.threshold).to(flagged)
        return flagged if self.form == "progressive" else 0.5 + 0.5 * (flagged - self.threshold) / (1 - self.threshold)

    def __call__(self, rewards: Tensor, flagged: Tensor, deployed: Tensor) -> Tensor:
        """rewards, flag probabilities and weights on the deployed block, [P, G] each -> advantages [P, G]."""
        paid = rewards - self.penalty * self.charge(flagged)
        centred = paid - paid.mean(1, keepdim=True)
        return centred / (paid.std(1, keepdim=True) + 1e-6) if self.scale == "sample" else centred
