"""Route whole rollouts: a flagged one trains the quarantine, which deployment deletes (graft.md §1.2-1.3, routing.md §2, §4).

A rollout's label becomes a triple (forward scale of the quarantine, weight on deployed, weight on quarantine):

    w = (1 - p) clean + p flagged            clean            flagged
    classic                                  (1, 1)           (1 - l, 1 + l (kappa_Q - 1))
    exclusive                                (1 + l (kappa_D - 1), 1 - l)    as classic
    scaled                                   (1, alpha)       as classic
    custom                                   clean            flagged, as given
    trusted (keep)                           (1, 0)           -
    quarantine off (anchors, off groups)     (1 - p, 0)       -

l is lambda: 1 routes fully, less leaves a part where it was, more trains the deployed block away from flagged rollouts
(over-routing, graft.md §1.5). Over-routing is capped group by group, so that the deployed block keeps a positive sum of weights
and no weight exceeds W_MAX: l_eff = max(1, min(l, 0.95 G / slope, (W_MAX - 1) / (kappa - 1))), slope = n_flagged (classic) or
n_flagged - n_clean (kappa_D - 1) (exclusive). kappa restores the pressure on a block that trains alone: with
kappa from the sizes, w_D n_D + w_Q n_Q = n_D + n_Q for every rollout (equal pressure). Parameters are masked, activations
keep their gradient, so the quarantine learns from a flagged rollout exactly as in unmasked training (SGTM).

    forward: off_when_clean    SGTM: `clean_share` of the groups, drawn before sampling, run with the quarantine off in
                               sampling, old and new log-probs (routing.md §4.2). A rollout flagged there contradicts its
                               group: weight 0, stays in the mean, counted in route/flagged_off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, Adapter
from grpo_routing.projections.projection import Projection, kept
from grpo_routing.rollout import uniforms
from grpo_routing.types import Labels, Weights

MODES = ("classic", "exclusive", "scaled", "custom")
W_MAX = 4.0  # the largest weight that a rollout may get: kappa is a rate multiplier in disguise (graft.md §1.3)


@dataclass(frozen=True)
class Route(Projection):
    mode: str
    alpha: float  # scaled: weight of clean rollouts on the quarantine
    strength: float  # lambda
    kappa: float | str  # weight on the block that trains alone: a number, or `sizes`
    clean: tuple[float, float]  # custom: weights of a clean rollout on (deployed, quarantine)
    flagged: tuple[float, float]  # custom: of a flagged one
    forward: str  # on or off_when_clean
    clean_share: float  # off_when_clean: share of the groups that run with the quarantine off
    takes = ("none", "rollout")
    needs_quarantine = True
    shares_axes = False
    blocks = (DEPLOYED, QUARANTINE)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"projection.mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if not 0 <= self.strength <= W_MAX:
            raise ValueError(f"projection.strength (lambda) must lie in [0, {W_MAX:g}]; got {self.strength}")
        if self.strength > 1 and self.mode not in ("classic", "exclusive"):
            raise ValueError(f"projection.strength above 1 is defined for the modes classic and exclusive; got {self.mode!r}")
        if self.kappa != "sizes" and not (isinstance(self.kappa, (int, float)) and 0 < self.kappa <= W_MAX):
            raise ValueError(f"projection.kappa must be `sizes` or a number in (0, {W_MAX:g}]; got {self.kappa!r}")
        if self.forward not in ("on", "off_when_clean"):
            raise ValueError(f"projection.forward must be on or off_when_clean; got {self.forward!r}")
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"projection.clean_share must lie in [0, 1]; got {self.clean_share}")

    def scales(self, groups: int, seed: tuple) -> list[float]:
        if self.forward == "on":
            return [1.0] * groups
        return [0.0 if draw < self.clean_share else 1.0 for draw in uniforms([(*seed, place) for place in range(groups)], 1)[:, 0].tolist()]

    def pressures(self, adapter: Adapter) -> tuple[float, float]:
        """kappa of (deployed, quarantine). Raises ValueError when a weight would exceed W_MAX."""
        sizes = {block: adapter.size(block) for block in self.blocks}
        if (largest := self.heaviest(sizes)) > W_MAX:
            raise ValueError(f"projection.kappa=sizes gives a weight of {largest:.1f}, more than {W_MAX:g}, for blocks of "
                             f"{sizes[DEPLOYED]} and {sizes[QUARANTINE]} numbers; bring the sizes closer or set kappa")
        return self.kappas(sizes)

    def kappas(self, sizes: dict[str, int]) -> tuple[float, ...]:
        """By `sizes`: (all trainable numbers) / (the block's), the weight that lets a smaller block learn as fast (graft.md §1.3)."""
        return tuple(sum(sizes.values()) / sizes[block] if self.kappa == "sizes" else self.kappa for block in self.blocks)

    def heaviest(self, sizes: dict[str, int]) -> float:
        """The largest kappa that is used; `custom` uses none. `sizes` need only be proportional to the blocks' numbers."""
        if self.mode == "custom":
            return 0.0
        kappa_d, kappa_q = self.kappas(sizes)
        return max(kappa_d, kappa_q) if self.mode == "exclusive" else kappa_q

    def table(self, adapter: Adapter, strength: float | Tensor) -> dict[str, tuple]:
        """clean, flagged -> weights on (deployed, quarantine), at lambda `strength` (a number, or [B])."""
        if self.mode == "custom":
            return {"clean": self.clean, "flagged": self.flagged}
        kappa_d, kappa_q = self.pressures(adapter)
        clean = {"classic": (1.0, 1.0), "scaled": (1.0, self.alpha), "exclusive": (1 + strength * (kappa_d - 1), 1 - strength)}
        return {"clean": clean[self.mode], "flagged": (1 - strength, 1 + strength * (kappa_q - 1))}

    def effective(self, flagged: Tensor, adapter: Adapter) -> Tensor:
        """lambda of each group, capped: flag probabilities [P, G] -> [P, 1]."""
        if self.strength <= 1:
            return flagged.new_full((len(flagged), 1), self.strength)
        kappa_d, kappa_q = self.pressures(adapter)
        marked = flagged.sum(1, keepdim=True)
        slope = marked - ((flagged.shape[1] - marked) * (kappa_d - 1) if self.mode == "exclusive" else 0)
        largest = max(kappa_d, kappa_q) if self.mode == "exclusive" else kappa_q
        room = (W_MAX - 1) / (largest - 1) if largest > 1 else math.inf
        by_group = torch.where(slope > 0, 0.95 * flagged.shape[1] / slope.clamp_min(1e-9), math.inf)
        return by_group.clamp_max(min(self.strength, room)).clamp_min(1.0)

    def weights(self, labels: Labels, quarantine: Tensor, adapter: Adapter, group: int) -> Weights:
        p = labels.flagged
        table = self.table(adapter, self.effective(p.view(-1, group), adapter).expand(-1, group).flatten())
        deployed, own = ((1 - p) * table["clean"][i] + p * table["flagged"][i] for i in (0, 1))
        off = quarantine == 0
        deployed = torch.where(off, kept(labels), torch.where(labels.trusted, torch.ones_like(p), deployed))
        return Weights(deployed, torch.where(off | labels.trusted, torch.zeros_like(p), own))
