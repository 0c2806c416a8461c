"""From scores to labels: which rollouts are flagged, which are trusted, and how sure that is.

    rule        a rollout is flagged when its score
    threshold   exceeds `threshold`
    pilot       exceeds the 1 - share quantile of the untrained policy's scores on `pilot` batches, fixed from then on
    history     exceeds the weighted 1 - share quantile of this and earlier steps, a score of age a with weight decay^a
    quantile    is among the highest `share` of its step, exactly (graft.md T7)
    group       is among the highest `share` of its prompt's rollouts, exactly

The lowest `trusted_share` (threshold: scores below `trusted_threshold`) are trusted by the same rule, which makes labels
tri-state. With `softness` s above 0 a flag is a probability, sigmoid((score - cut) / (s * spread of the step's scores)).
Hard rules by rank do not change under a monotone transform of the scores (T8). A rollout that has no score (nan) is neither
flagged nor trusted, and shares are of those that have one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import Labels

RULES = ("threshold", "pilot", "history", "quantile", "group")
FORGOTTEN = 1e-3  # a weight below this is dropped from the history


@dataclass(frozen=True)
class Calibration:
    rule: str
    threshold: float
    share: float
    trusted_threshold: float | None
    trusted_share: float
    decay: float
    pilot: int
    softness: float

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"calibration.rule must be one of {', '.join(RULES)}; got {self.rule!r}")
        if not (self.share >= 0 and self.trusted_share >= 0 and self.share + self.trusted_share <= 1):
            raise ValueError(f"calibration.share and trusted_share are shares of the rollouts, at most 1 together; got {self.share} "
                             f"and {self.trusted_share}")
        if self.trusted_threshold is not None and self.trusted_threshold > self.threshold:
            raise ValueError(f"calibration.trusted_threshold must not exceed threshold; got {self.trusted_threshold} and {self.threshold}")
        if not 0 < self.decay <= 1 or self.softness < 0 or self.pilot < 0 or (self.rule == "pilot" and not self.pilot):
            raise ValueError(f"calibration needs decay in (0, 1], softness >= 0 and, for rule=pilot, pilot >= 1; got {self.decay}, "
                             f"{self.softness} and {self.pilot}")

    @property
    def pilot_batches(self) -> int:
        return self.pilot if self.rule == "pilot" else 0

    def prepare(self, scores: Tensor) -> Memory:
        """What the pilot's scores fix."""
        return dict(zip(("cut", "trusted_cut"), self._cuts(finite(scores)))) if self.rule == "pilot" else {}

    def __call__(self, scores: Tensor, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        """Labels of the step from its scores [B]."""
        scores = scores.double()
        spread = finite(scores).std(correction=0) if bool(scores.isfinite().any()) else scores.new_zeros(())
        flags, trusted = scores.new_zeros(len(scores)), torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        if self.rule in ("quantile", "group"):
            for rows in view.groups() if self.rule == "group" else [list(range(len(scores)))]:
                own = scores[rows]
                flags[rows] = self._sure(own, highest(own, self.share), spread)
                trusted[rows] = highest(-own.flip(0), self.trusted_share).flip(0)  # ties from the other end: no rollout is in both shares
        else:
            cut, low, memory = self._levels(scores, view.step, memory)
            trusted = scores.isfinite() & (scores < low)
            flags = self._soft(scores, cut, spread) if self.softness else (scores > cut).double()
        flags = torch.where(trusted | ~scores.isfinite(), 0.0, flags)
        return Labels(flags.to(view.rewards), trusted & (flags == 0), scores), memory

    def _sure(self, scores: Tensor, chosen: Tensor, spread: Tensor) -> Tensor:
        if not self.softness or not bool(chosen.any()) or bool((chosen | ~scores.isfinite()).all()):
            return chosen.double()
        cut = (scores[chosen].min() + scores[~chosen & scores.isfinite()].max()) / 2
        return self._soft(scores, cut, spread)

    def _soft(self, scores: Tensor, cut: Tensor, spread: Tensor) -> Tensor:
        return torch.sigmoid((scores - cut) / (self.softness * spread).clamp_min(1e-12))

    def _levels(self, scores: Tensor, step: int, memory: Memory) -> tuple[Tensor, Tensor, Memory]:
        """The cuts above which rollouts are flagged and below which they are trusted."""
        if self.rule == "threshold":
            low = -torch.inf if self.trusted_threshold is None else self.trusted_threshold
            return scores.new_tensor(self.threshold), scores.new_tensor(low), memory
        if self.rule == "pilot":
            return memory["cut"].to(scores), memory["trusted_cut"].to(scores), memory
        now = torch.stack([finite(scores), torch.full_like(finite(scores), step)], 1)
        history = torch.cat([memory["history"].to(scores), now]) if "history" in memory else now
        weights = self.decay ** (step - history[:, 1])
        history, weights = history[weights >= FORGOTTEN], weights[weights >= FORGOTTEN]
        return *self._cuts(history[:, 0], weights), memory | {"history": history}

    def _cuts(self, scores: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = torch.ones_like(scores) if weights is None else weights
        low = -weighted_quantile(-scores, weights, 1 - self.trusted_share) if self.trusted_share else scores.new_tensor(-torch.inf)
        return weighted_quantile(scores, weights, 1 - self.share), low


def finite(scores: Tensor) -> Tensor:
    return scores[scores.isfinite()].double()


def weighted_quantile(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """The smallest value with at least `share` of the weight at or below it; infinity of nothing."""
    if not len(values):
        return values.new_tensor(torch.inf)
    order = values.argsort()
    reached = weights[order].cumsum(0) >= share * weights.sum() * (1 - 1e-12)
    return values[order[int(reached.int().argmax())]]


def highest(scores: Tensor, share: float) -> Tensor:
    """True for the `share` of rollouts with the highest scores, rounded; ties go to the earlier rollout, nan to nobody. [B] bool."""
    able = scores.isfinite()
    flags = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    order = torch.where(able, scores, -torch.inf).argsort(descending=True, stable=True)
    flags[order[: round(share * int(able.sum()))]] = True
    return flags
