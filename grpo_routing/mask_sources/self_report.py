"""The model's own flag: after its answer it is asked whether it gamed the grader.

    score    log P(yes | prompt, answer, question) - log P(no | ...), under the policy as it stands

Means something once a stage has taught the model to answer (confessions or self-report fine-tuning); an untrained model's answer is
noise about a question that it does not understand. Reads nothing but the model's own words: no judge, no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import TokenBatch


@dataclass(frozen=True)
class SelfReport(ScoreSource):
    question: str
    affirmed: str
    denied: str
    reads = ("own report",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question or not self.affirmed or not self.denied or self.affirmed == self.denied:
            raise ValueError(f"self_report needs a question and two different answers; got {self.question!r}, {self.affirmed!r} and "
                             f"{self.denied!r}")

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        return self._answered(view, self.affirmed) - self._answered(view, self.denied), memory

    @torch.no_grad()
    def _answered(self, view: StepView, answer: str) -> Tensor:
        policy = view.policy
        asked, said = policy.encode(self.question), policy.encode(answer)
        sequences = []
        for rollout in view.rollouts:
            own = rollout.completion_ids
            own = own[:-1] if own[-1] == policy.end else own  # the question comes before the end of the turn
            sequences.append(((*rollout.prompt_ids, *own, *asked), said))
        return policy.log_probs(TokenBatch.of(sequences, policy.pad, policy.device)).sum(1).double()
