"""The model's own flag: after its answer it is asked whether it gamed the grader.

    score    log P(yes | prompt, answer, question) - log P(no | ...), under the policy as it stands

Means something once a stage has taught the model to answer (confessions or self-report fine-tuning); an untrained model's answer is
noise about a question that it does not understand. Reads nothing but the model's own words: no judge, no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.questioning import log_odds


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
        return log_odds(view.policy, view.rollouts, self.question, self.affirmed, self.denied), memory
