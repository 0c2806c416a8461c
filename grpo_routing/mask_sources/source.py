"""What every mask source answers. A source of kind `rollout` labels rollouts, one of kind `subspace` gives a basis (`fit`).

    label = control(judge)           MaskSource: whatever the source says, or the control of it
    judge = calibration(score)       ScoreSource: one number per rollout, the higher the more hack-ward

`reads` says what a source looks at, and the build refuses what must not be looked at: a held-out loophole always, the truth
unless the arm says `uses_oracle: true`. What a source keeps from step to step is its memory, tensors by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.calibration import Calibration
from grpo_routing.mask_sources.controls import OF_LABELS, controlled, draws
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import Labels


@dataclass(frozen=True)
class MaskSource(ABC):
    control: str  # none, or the negative control that stands in for the source
    seed: int
    kinds = ("rollout",)
    kind = "rollout"
    reads = ()
    pilot_batches = 0  # batches of the untrained policy that it wants to see before step 0
    uses_oracle = False
    needs_quarantine = False
    needs_coordinates = False  # of an adapter that has them
    controls = OF_LABELS
    default_control = "rate_matched"  # the one that a sweep adds

    def __post_init__(self) -> None:
        if self.control not in self.controls:
            raise ValueError(f"mask_source.control must be one of {', '.join(self.controls)} here; got {self.control!r}")

    def prepare(self, views: list[StepView]) -> Memory:
        """What the pilot's `pilot_batches` batches teach."""
        return {}

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        labels, memory = self.judge(view, memory)
        return controlled(self.control, labels, view, self.seed), memory

    @abstractmethod
    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        """The source's own labels, and what it remembers."""

    def facts(self, memory: Memory) -> dict[str, float]:
        """What is worth logging about the source itself (names in log.py, after `route/`)."""
        return {}


@dataclass(frozen=True)
class ScoreSource(MaskSource):
    """A source that gives one number per rollout."""

    calibration: Calibration
    controls = (*OF_LABELS, "random")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "rollout" and self.control == "random" and self.calibration.rule == "threshold":
            raise ValueError("mask_source.control=random draws scores, and calibration.rule=threshold is on the source's own scale; choose "
                             "control=rate_matched, or another rule")

    @property
    def pilot_batches(self) -> int:
        return self.calibration.pilot_batches

    def prepare(self, views: list[StepView]) -> Memory:
        memory: Memory = {}
        scores = []
        for view in views:
            own, memory = self.scored(view, memory)
            scores.append(own)
        return memory | self.calibration.prepare(torch.cat(scores))

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        scores, memory = self.scored(view, memory)
        return self.calibration(scores, view, memory)

    def scored(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        """The scores that are calibrated, [B]: the source's own, or those of a control. nan where it cannot say."""
        scores, memory = self.score(view, memory)
        if self.control == "random":
            return torch.where(scores.isfinite(), draws("random", view, self.seed).to(scores), scores), memory
        return -scores if self.control == "inverted" else scores, memory

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        labels, memory = self.judge(view, memory)
        # `inverted` has turned the scores already
        return labels if self.control == "inverted" else controlled(self.control, labels, view, self.seed), memory

    @abstractmethod
    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        """How hack-ward each rollout is, [B]."""
