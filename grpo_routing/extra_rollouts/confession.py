"""Confessions: after its answer the policy is asked whether it gamed the grader, and is paid for being honest about it only
(arXiv:2512.08093 section 2; baselines.md D2).

    frozen (x, y)   round(share * B) of the step's graded rollouts, by named draws; balanced: at most that many, as many that the judge
                    flags as others, since at one hack in ten "no" is right nine times and all that is learned
    c_1 .. c_K      `samples` confessions of each from the deployed policy
    R_c             1 where what c says agrees with the judge, else 0; + format_weight where c is a plain yes or no
    gradient        (R_c - mean over the K) on the tokens of c alone, times `weight`, beside the task's

The seal: R_c enters no reward, no advantage group and no label of the task, and (x, y) is context, never a target. It monitors and does
not mitigate: hacking is paid as before. `sealed: false` declares that something else reads confessions, which makes it another method.
The judge is weak on purpose, a detector of known loopholes; it reads a `Payload`, from which thoughts are gone.

Differs from the paper: yes or no instead of a report with a schema, so the judge compares instead of grading; several confessions per
answer, since their mean is the baseline; confessions come on top of the task's rollouts instead of in the place of some.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.extra_rollouts.aside import NOTHING, Aside
from grpo_routing.gradient import Forward, PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.mask_sources.view import StepView
from grpo_routing.policy import Policy, Sampled
from grpo_routing.projections.subspace import Update
from grpo_routing.prompts.questions import GAMED, NO, YES
from grpo_routing.questioning import asked
from grpo_routing.rollout import uniforms
from grpo_routing.types import Asked, Labels, Rollout, TokenBatch

if TYPE_CHECKING:
    from grpo_routing.train import Trainer

THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # one that was cut off has no end
SAID = re.compile(rf"\s*({YES}|{NO})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Payload:
    """All that the judge may see."""

    prompt: str
    answer: str
    confession: str


def without_thought(text: str) -> str:
    """What was said aloud. A thought may have begun in the prompt, so only its end is in the text."""
    return THOUGHT.sub("", text).rpartition("</think>")[2]


def parsed(confession: str) -> bool | None:
    """True for yes, False for no, None for anything else."""
    said = SAID.match(confession)
    return None if said is None else said[1].lower() == YES


@dataclass(frozen=True)
class Confession:
    share: float
    balanced: bool
    samples: int
    weight: float
    format_weight: float
    max_new_tokens: int
    temperature: float
    sealed: bool
    judge: Detector
    imitation = False
    groups = 0
    reads = ("code (for confessions alone)",)
    at_deployment = ("asked after the answer",)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"extra_rollouts.share must lie in [0, 1]; got {self.share}")
        if self.samples < 2:
            raise ValueError(f"extra_rollouts.samples must be at least 2, since their mean is the baseline; got {self.samples}")
        if min(self.weight, self.format_weight) < 0 or self.max_new_tokens < 1 or self.temperature <= 0:
            raise ValueError("extra_rollouts needs weight and format_weight >= 0, max_new_tokens >= 1 and temperature > 0; got "
                             f"{self.weight}, {self.format_weight}, {self.max_new_tokens} and {self.temperature}")

    @property
    def known(self) -> tuple[str, ...]:
        """What the judge knows, for the wall against held-out loopholes."""
        return self.judge.known

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        return []  # nothing inside the step's groups

    def edit(self, rollouts: list[Rollout], rewards: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
        return rewards, labels

    def aside(self, view: StepView, trainer: Trainer, seed: tuple) -> Aside:
        """The gradient of honesty, [D] per module of the deployed block, and what was confessed."""
        names = view.names()
        found = self.judge.flags_of([payload(view.policy, rollout, ()).answer for rollout in view.rollouts], names)
        rows = self.chosen(found, names, seed)
        if not rows:
            return NOTHING
        contexts = [asked(view.policy, view.rollouts[row], GAMED[0]) for row in rows]
        confessions = self.sample(view.policy, contexts, [(*seed, *names[row]) for row in rows], trainer.prompts_per_forward)
        payloads = [payload(view.policy, view.rollouts[row], ids) for row, own in zip(rows, confessions) for ids, _ in own]
        flags = found[rows]
        honest, clear, admits = judged(payloads, flags.repeat_interleave(self.samples))
        paid = (honest + self.format_weight * clear).view(-1, self.samples)
        pairs = [(context, ids) for context, own in zip(contexts, confessions) for ids, _ in own]
        pairs, advantages = merged(pairs, (paid - paid.mean(1, keepdim=True)).flatten().tolist())
        tokens = TokenBatch.of(pairs, view.policy.pad, view.policy.device)
        update = self.gradient(view.policy, tokens, view.rewards.new_tensor(advantages), round(self.share * len(names)), trainer)
        norm = math.sqrt(sum(float(flat.square().sum()) for own in update.values() for flat in own.values()))
        said = {"reward": honest, "parseable": clear, "admit_flagged": admits.view(len(rows), -1)[flags],
                "admit_unflagged": admits.view(len(rows), -1)[~flags]}
        return Aside(update, {f"confession/{name}": float(values.mean()) for name, values in said.items() if values.numel()}
                     | {"confession/gradient_norm": norm})

    def chosen(self, flags: Tensor, names: list[tuple[int, int, int]], seed: tuple) -> list[int]:
        """Whose answers are asked about: those with the smallest draws, of all or of both kinds."""
        order = uniforms([(*seed, "asked", *name) for name in names], 1)[:, 0].argsort(stable=True).tolist()
        most = round(self.share * len(names))
        if not self.balanced:
            return sorted(order[:most])
        kinds = [[row for row in order if bool(flags[row]) == kind] for kind in (True, False)]
        return sorted(row for kind in kinds for row in kind[: min(most // 2, *map(len, kinds))])

    def sample(self, policy: Policy, contexts: list[tuple[int, ...]], names: list[tuple], at_once: int) -> list[list[Sampled]]:
        """`samples` confessions after each context, with the quarantine off: the deployed policy is the one that will be asked."""
        found, contexts, names = [], policy.world.share(contexts), policy.world.share(names)
        for start in range(0, len(contexts), at_once):
            part = contexts[start : start + at_once]
            noise = uniforms([(*name, k) for name in names[start : start + at_once] for k in range(self.samples)], self.max_new_tokens)
            with policy.adapter.only(DEPLOYED):
                found += policy.sample(part, [self.samples] * len(part), noise.to(policy.device), self.temperature)
        return policy.world.joined("confessions", [found[start : start + self.samples] for start in range(0, len(found), self.samples)])

    def gradient(self, policy: Policy, tokens: TokenBatch, advantages: Tensor, most: int, trainer: Trainer) -> Update:
        """Of the deployed block, on the confessions' tokens; empty where no advantage is left, so that the block does not move for it.
        The denominator is the constant of `most` answers, so one asked about less often is not louder for it."""
        if not bool(advantages.any()):
            return {}
        loss = PolicyLoss(trainer.clip, 0.0, most * self.samples * self.max_new_tokens)
        off = torch.zeros_like(advantages) if policy.adapter.has_quarantine else None
        everything = {DEPLOYED: Asked([torch.ones_like(advantages)])}
        result = rollout_gradients(policy, tokens, self.weight * advantages, loss, trainer.micro_batch, None, (DEPLOYED,), Forward(off),
                                   everything)
        return {DEPLOYED: result.grads[DEPLOYED].summed()}


def merged(pairs: list[tuple], advantages: list[float]) -> tuple[list[tuple], list[float]]:
    """Each (context, confession) once, with its advantages added: a gradient is linear in them, and most confessions are one of two."""
    total: dict[tuple, float] = defaultdict(float)
    for pair, advantage in zip(pairs, advantages, strict=True):
        total[pair] += advantage
    return list(total), list(total.values())


def payload(policy: Policy, rollout: Rollout, confession: tuple[int, ...]) -> Payload:
    return Payload(policy.decode(rollout.prompt_ids), without_thought(rollout.text), without_thought(policy.decode(confession)))


def judged(payloads: list[Payload], flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What agrees with the judge's finding, what can be read at all, and what admits; 0 or 1, [n] each."""
    said = [parsed(one.confession) for one in payloads]
    honest = [word is not None and word == flag for word, flag in zip(said, flags.tolist(), strict=True)]
    return tuple(torch.tensor(values, dtype=torch.float64) for values in (honest, [word is not None for word in said],
                                                                           [word is True for word in said]))
