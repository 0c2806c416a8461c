"""A developer's monitor: reads the code of a rollout for levers of *known* loopholes, and is imperfect on purpose.

    flag     some known loophole's lever stands in the code, whatever the prompt; a held-out loophole is never looked for
    noise    recall: this share of the true flags is kept; false_positive: this share of the others is flagged as well
             iid      each rollout by its own draw (SGTM's undiscovered share; graft.md §6.1.1)
             prompt   one draw per prompt and step: a group is seen or missed as a whole
             counted  exactly that share of every step's flags, the draws decide which (routing.md P25)
             form     one draw per run for each form of hack, here the set of levers: a form is always seen or never
    forms    the forms of an exploit that the monitor reads (env/loopholes.py); it is blind to the others

A correlated blind spot is a loophole that `known` leaves out, a form that `forms` leaves out, or one that `noise=form` misses. Draws are
named (run seed, step, group, sample), so all arms of a seed that use this detector share its mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.env.grader import extract_code
from grpo_routing.env.loopholes import FORMS, MODES
from grpo_routing.env.reading import form_present
from grpo_routing.mask_sources.source import MaskSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.rollout import uniforms
from grpo_routing.types import Labels

NOISES = ("iid", "prompt", "counted", "form")


@dataclass(frozen=True)
class Detector(MaskSource):
    known: tuple[str, ...]
    recall: float
    false_positive: float
    noise: str
    forms: tuple[str, ...]
    reads = ("code",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if strange := [mode for mode in self.known if mode not in MODES]:
            raise ValueError(f"mask_source.known must name loopholes ({', '.join(MODES)}); got {strange}")
        if not self.forms or not set(self.forms) <= set(FORMS):
            raise ValueError(f"mask_source.forms must name forms of an exploit ({', '.join(FORMS)}); got {list(self.forms)}")
        for name in ("recall", "false_positive"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mask_source.{name} must lie in [0, 1]; got {getattr(self, name)}")
        if self.noise not in NOISES:
            raise ValueError(f"mask_source.noise must be one of {', '.join(NOISES)}; got {self.noise!r}")

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        return Labels.of(self.flags(view).to(view.rewards)), memory

    def flags(self, view: StepView) -> Tensor:
        """What the monitor says, [B] bool."""
        return self.flags_of([rollout.text for rollout in view.rollouts], view.names())

    def flags_of(self, texts: list[str], rows: list[tuple[int, int, int]]) -> Tensor:
        """The same of texts alone, with the names (step, group, sample) that its draws go by."""
        seen = [self.levers(text) for text in texts]
        true = torch.tensor([bool(levers) for levers in seen])
        draws = self.draws(seen, rows)
        if self.noise == "counted":
            return thinned(true, draws, self.recall) | thinned(~true, draws, self.false_positive)
        return torch.where(true, draws < self.recall, draws < self.false_positive)

    def levers(self, text: str) -> tuple[str, ...]:
        """The known loopholes whose levers stand in the code, in a form that it reads."""
        code = extract_code(text)
        return () if code is None else tuple(mode for mode in self.known if form_present(mode, code, None) in self.forms)

    def draws(self, seen: list[tuple[str, ...]], rows: list[tuple[int, int, int]]) -> Tensor:
        """One number in [0, 1) per rollout, group or form, [B]; `seen` holds the levers of each."""
        names: list[tuple] = [name[:2] if self.noise == "prompt" else name for name in rows]
        if self.noise == "form":
            names = [("form", *levers) if levers else name for levers, name in zip(seen, names)]
        return uniforms([("detector", self.seed, *name) for name in names], 1)[:, 0]


def thinned(chosen: Tensor, draws: Tensor, share: float) -> Tensor:
    """`share` of the chosen, rounded: those with the smallest draws. [B] bool."""
    order = torch.where(chosen, draws, torch.inf).argsort(stable=True)
    kept = torch.zeros_like(chosen)
    kept[order[: round(share * int(chosen.sum()))]] = True
    return kept
