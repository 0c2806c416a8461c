"""How much the quarantine does on a rollout: the one statistic of GRAFT's mechanism probes whose sign held in every environment
(graft.md §1.13, §6.1.1 `forget_act`).

    score    mean over the completion's tokens and the adapted modules of |quarantine branch|, at forward scale 1

It bootstraps: what the quarantine learned from flagged rollouts makes it active on rollouts like them, which are flagged next. At
the start the quarantine is zero and says nothing, so nothing is flagged until another source (`or`, then `delay`) or unmasked
absorption has taught it something. No label, no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView


@dataclass(frozen=True)
class QuarantineActivity(ScoreSource):
    reads = ("activations",)
    needs_quarantine = True

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        norms = torch.stack(list(view.policy.branch_norms(view.tokens, QUARANTINE).values())).mean(0)
        return torch.where(norms > 0, norms, torch.nan).double(), memory
