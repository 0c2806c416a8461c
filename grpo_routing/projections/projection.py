"""What every projection answers; the defaults are those of vanilla GRPO on the deployed block.

    scales      which groups are sampled and trained with the quarantine off, chosen before sampling
    weights     what a rollout's label does to its gradient in each block
    passes      activation stop-gradient, for methods that mask in the forward
    gradient    what becomes of the summed gradient (subspace sources)
    step        what becomes of the optimizer's step (subspace sources)
"""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.types import Labels, Weights

if TYPE_CHECKING:
    from grpo_routing.adapters.adapter import Adapter
    from grpo_routing.projections.subspace import Update
    from grpo_routing.types import Basis


class Projection(ABC):
    takes: tuple[str, ...]  # kinds of mask source: none, subspace, rollout
    needs_quarantine = False
    shares_axes = True  # whether both blocks may turn the same singular axes, ...
    needs_shared_axes = False  # ... and whether they must
    masks_forward = False  # whether labels are needed before the backward
    trains_gate = False  # whether it has a loss for the gate of the quarantine
    blocks: tuple[str, ...] = (DEPLOYED,)  # whose gradients it needs
    stop_at = "output"

    def heaviest(self, sizes: dict[str, int]) -> float:
        """The largest weight that blocks of these sizes get because of them."""
        return 1.0

    def scales(self, groups: int, seed: tuple) -> list[float]:
        """Forward scale of the quarantine for each group of the step."""
        return [1.0] * groups

    def weights(self, labels: Labels, quarantine: Tensor, adapter: Adapter, group: int) -> Weights:
        """Per-rollout weights of the blocks; `quarantine` [B] is each rollout's forward scale, `group` the size of a group."""
        return Weights(torch.ones_like(labels.flagged), torch.zeros_like(labels.flagged))

    def passes(self, labels: Labels) -> dict[str, Tensor] | None:
        return None

    def aid(self, labels: Labels, quarantine: Tensor, adapter: Adapter):
        """A further loss per rollout, read off the gradient forward; None for none."""
        return None

    def gradient(self, update: Update, basis: Basis | None) -> Update:
        return update

    def step(self, applied: Update, basis: Basis | None) -> Update:
        return applied


def kept(labels: Labels) -> Tensor:
    """1 - p: what is left of a rollout where flagged ones are dropped, [B]."""
    return 1 - labels.flagged
