"""How much likelier the quarantine makes a rollout (graft.md §6.1.1):

    score    mean over the completion's tokens of log pi(both blocks) - log pi(deployed)

A rollout that the deployed policy would hardly have written is the quarantine's doing. Zero for all at the start, and then nothing is
flagged; see quarantine_activity for how it bootstraps. No label, no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView


@dataclass(frozen=True)
class LogpGap(ScoreSource):
    reads = ("activations",)
    needs_quarantine = True

    @torch.no_grad()
    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        both = view.policy.log_probs(view.tokens)
        with view.policy.adapter.only(DEPLOYED):
            deployed = view.policy.log_probs(view.tokens)
        gap = (both - deployed).sum(1).double() / view.tokens.completion_mask.sum(1)
        return torch.where((both != deployed).any(1), gap, torch.nan), memory
