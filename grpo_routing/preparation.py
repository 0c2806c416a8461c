"""What is done to a model's weights before any reinforcement: nothing, or fine-tuning on self-reports (self_report_sft.py)."""

from __future__ import annotations

from dataclasses import dataclass

NONE, SELF_REPORT_SFT = "none", "self_report_sft"
STAGES = (NONE, SELF_REPORT_SFT)
SOURCES = ("off_policy", "on_policy")


@dataclass(frozen=True)
class Preparation:
    """`stage` none leaves the model alone, and then no other setting means anything (conf/model/base/prepare.yaml says what each is)."""

    stage: str
    samples: int
    wrong_share: float
    error_source: str
    mask_turn1: bool
    tests: int
    length_weights: tuple[float, ...]
    epochs: int
    batch: int
    lr: float
    warmup_steps: int
    temperature: float
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        for name, legal in (("stage", STAGES), ("error_source", SOURCES)):
            if getattr(self, name) not in legal:
                raise ValueError(f"model.prepare.{name} must be one of {', '.join(legal)}; got {getattr(self, name)!r}")
        if not 0 <= self.wrong_share <= 1:
            raise ValueError(f"model.prepare.wrong_share must lie in [0, 1]; got {self.wrong_share}")
        if min(self.samples, self.tests, self.epochs, self.batch, self.max_new_tokens) < 1:
            raise ValueError("model.prepare needs samples, tests, epochs, batch and max_new_tokens of at least 1; got "
                             f"{self.samples}, {self.tests}, {self.epochs}, {self.batch} and {self.max_new_tokens}")
