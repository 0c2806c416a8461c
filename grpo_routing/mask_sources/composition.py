"""Sources of sources, for those that label rollouts. A composition is what it is made of: it knows, reads and costs as much.

    and      flagged as far as both say so: min of the probabilities; trusted where one trusts and it is not flagged
    or       flagged as far as either says so: max; trusted where both trust
    not      1 - p; what was trusted is flagged
    delay    says nothing before step `start`
    budget   at most `share` of every step's rollouts, those with the highest flag and then the highest score

so that not (a or b) = (not a) and (not b). In YAML an inner source is a group of its own:
`mask_source=or mask_source@mask_source.first=detector mask_source@mask_source.second=logp_gap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_routing.mask_sources.calibration import highest
from grpo_routing.mask_sources.source import MaskSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import Labels


@dataclass(frozen=True)
class Composed(MaskSource):
    """What a composition inherits from its parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in self.parts.items():
            if part.kind != "rollout":
                raise ValueError(f"mask_source.{name} must label rollouts; {type(part).__name__} gives a {part.kind}")

    @property
    def parts(self) -> dict[str, MaskSource]:
        return {name: getattr(self, name) for name in ("first", "second", "inner") if hasattr(self, name)}

    @property
    def known(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(mode for part in self.parts.values() for mode in getattr(part, "known", ())))

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word for part in self.parts.values() for word in part.reads))

    @property
    def uses_oracle(self) -> bool:
        return any(part.uses_oracle for part in self.parts.values())

    @property
    def needs_quarantine(self) -> bool:
        return any(part.needs_quarantine for part in self.parts.values())

    @property
    def needs_coordinates(self) -> bool:
        return any(part.needs_coordinates for part in self.parts.values())

    @property
    def pilot_batches(self) -> int:
        return max(part.pilot_batches for part in self.parts.values())

    def prepare(self, views: list[StepView]) -> Memory:
        """Each part takes as many of the pilot's batches as it asked for."""
        return {f"{name}/{key}": value for name, part in self.parts.items() if part.pilot_batches
                for key, value in part.prepare(views[: part.pilot_batches]).items()}

    def ask(self, name: str, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        """What a part says; its memory is kept under its name."""
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in memory.items() if key.startswith(prefix)}
        labels, own = self.parts[name].label(view, own)
        rest = {key: value for key, value in memory.items() if not key.startswith(prefix)}
        return labels, rest | {prefix + key: value for key, value in own.items()}

    def facts(self, memory: Memory) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found |= part.facts({k.removeprefix(f"{name}/"): v for k, v in memory.items() if k.startswith(f"{name}/")})
        return found


@dataclass(frozen=True)
class And(Composed):
    first: Any
    second: Any

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        one, memory = self.ask("first", view, memory)
        two, memory = self.ask("second", view, memory)
        flagged = torch.minimum(one.flagged, two.flagged)
        return Labels(flagged, (one.trusted | two.trusted) & (flagged == 0)), memory


@dataclass(frozen=True)
class Or(Composed):
    first: Any
    second: Any

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        one, memory = self.ask("first", view, memory)
        two, memory = self.ask("second", view, memory)
        return Labels(torch.maximum(one.flagged, two.flagged), one.trusted & two.trusted), memory


@dataclass(frozen=True)
class Not(Composed):
    inner: Any

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        labels, memory = self.ask("inner", view, memory)
        return Labels(1 - labels.flagged, torch.zeros_like(labels.trusted), None if labels.scores is None else -labels.scores), memory


@dataclass(frozen=True)
class Delay(Composed):
    inner: Any
    start: int  # the first step at which it speaks

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        labels, memory = self.ask("inner", view, memory)
        silent = Labels(torch.zeros_like(labels.flagged), torch.zeros_like(labels.trusted), labels.scores)
        return (labels if view.step >= self.start else silent), memory


@dataclass(frozen=True)
class Budget(Composed):
    inner: Any
    share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"mask_source.share must lie in [0, 1]; got {self.share}")

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        labels, memory = self.ask("inner", view, memory)
        order = labels.flagged.double()
        if labels.scores is not None:  # a tie between flags is broken by score: by its rank, which no scale can outweigh
            rank = labels.scores.nan_to_num(nan=-torch.inf).argsort().argsort()
            order = order + 1e-6 * rank.to(order) / len(rank)
        allowed = highest(order, self.share)
        return Labels(torch.where(allowed, labels.flagged, torch.zeros_like(labels.flagged)), labels.trusted, labels.scores), memory
