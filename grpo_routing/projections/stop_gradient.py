"""Gradient routing on activations (Cloud et al. 2024, arXiv:2410.04332, section 3; routing.md §1.2, §4.2).

    flagged rollout    a' = M a + (1 - M) stopgrad(a)   on the deployed block's branch, M = (1 - p) + p `through`
    unflagged          nothing: both blocks train       (absorption)
    deployment         the quarantine is deleted        (expand, route, ablate)

at: output       stops the whole branch, A and B and the way to lower layers through it
at: bottleneck   stops between A and B: A is protected, B still learns, the leak of the paper's hook (routing.md P5)

Unlike `route`, which zeroes parameter gradients, this removes the branch's Jacobian, so lower layers get another gradient
than in unmasked training. Two aids from the paper, both off by default:

    l1      mean absolute inner activation of both blocks; only shown to matter for auto-encoders (routing.md §1.4)
    gate    BCE of the quarantine's input-conditioned gate (adapter.gate) against the label, on labelled rollouts: 1 where
            flagged, 0 where trusted or sampled with the quarantine off. In the paper's RL experiment routing without a
            gate loses its specialisation (Fig. 14); its coefficient is 0.01.

Departures: one mask per rollout, not per token; blocks of an adapter stand in for neurons and experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, Adapter
from grpo_routing.projections.projection import Projection
from grpo_routing.types import Labels, TokenBatch, Weights


@dataclass(frozen=True)
class StopGradient(Projection):
    at: str  # output or bottleneck
    through: float  # what a flagged rollout's branch lets through: 0; negative is gradient ascent (the paper's -0.75)
    l1: float  # weight of the mean absolute inner activation
    gate: float  # weight of the gate's BCE; needs adapter.gate=true
    takes = ("none", "rollout")
    needs_quarantine = True
    shares_axes = False
    masks_forward = True
    blocks = (DEPLOYED, QUARANTINE)

    def __post_init__(self) -> None:
        if self.at not in ("output", "bottleneck"):
            raise ValueError(f"projection.at must be output or bottleneck; got {self.at!r}")
        if self.l1 < 0 or self.gate < 0:
            raise ValueError(f"projection.l1 and projection.gate must not be negative; got {self.l1} and {self.gate}")

    @property
    def stop_at(self) -> str:
        return self.at

    @property
    def trains_gate(self) -> bool:
        return self.gate > 0

    def weights(self, labels: Labels, quarantine: Tensor, adapter: Adapter, group: int) -> Weights:
        """The forward already masks; a flagged rollout with the quarantine off has nothing to teach and is dropped."""
        off = quarantine == 0
        ones = torch.ones_like(labels.flagged)
        return Weights(torch.where(off, 1 - labels.flagged, ones), torch.where(off, 0 * ones, ones))

    def passes(self, labels: Labels) -> dict[str, Tensor]:
        return {DEPLOYED: (1 - labels.flagged) + labels.flagged * self.through}

    def aid(self, labels: Labels, quarantine: Tensor, adapter: Adapter):
        if not (self.l1 or self.gate):
            return None
        target = labels.flagged
        labelled = (target > 0) | labels.trusted | (quarantine == 0)

        def loss(part: TokenBatch, rows: list[int]) -> Tensor:
            """Mean over modules and completion tokens, then over the rollouts of the step, [b]."""
            value = torch.zeros(len(rows), dtype=target.dtype, device=target.device)
            if self.l1:
                inner = [hidden.abs().mean(-1) for module in adapter.modules.values() for hidden in module.hidden.values()]
                value = value + self.l1 * over_tokens(torch.stack(inner).mean(0), part)
            if self.gate:
                logits = torch.stack([gate for module in adapter.modules.values() for gate in module.gates.values()])
                wanted = target[rows][None, :, None].to(logits).expand_as(logits)
                error = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(0)
                value = value + self.gate * labelled[rows] * over_tokens(error, part)
            return value / len(target)

        return loss


def over_tokens(values: Tensor, part: TokenBatch) -> Tensor:
    """Mean over each row's completion tokens, [b, T] -> [b]."""
    mask = part.completion_mask.to(values)
    return (values[:, 1:] * mask).sum(1) / mask.sum(1)
