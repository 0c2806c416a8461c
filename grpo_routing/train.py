"""THE LINE: vanilla GRPO in the order of the paper's algorithm box. Every method is another object at one of its stages.

    problems -> prompt -> ROLLOUT (+ extra) -> GRADE -> MASK -> ADVANTAGE -> per-rollout GRADIENT -> PROJECT -> (+ aside) STEP
                                                 └─ tee -> audit (returns None)

MASK and ADVANTAGE may come after the GRADIENT, with the same result: a rollout's gradient is its advantage times that of
advantage 1, so masks that read gradients cost no second backward.

The line never learns what is true: it has no verdict, and the audit that computes one returns nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.decision import differentiate, natural, routed_gradients, summed, unit_gradients
from grpo_routing.env.grader import Grade, Grader, begin_with
from grpo_routing.env.problems import Problem
from grpo_routing.gradient import GradientResult, PolicyLoss
from grpo_routing.mask_sources.direction import Fit, check_overlap, overlap
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.measure import diagnosed, measure, measure_blocks, measure_direction, measure_trusted
from grpo_routing.optimizers import Optimizer
from grpo_routing.policy import Policy
from grpo_routing.projections.projection import Projection
from grpo_routing.projections.subspace import Update
from grpo_routing.rollout import OWN, Engine, Seat, fill_groups, retold, sample_rollouts
from grpo_routing.types import ANCHOR, STUDENT, Labels, Rollout, TokenBatch, Trusted

Truth = Callable[[list[Problem], list[Rollout], list[Grade]], Tensor]
Audit = Callable[[int, list[Problem], list[Rollout], list[Grade], Labels], None]


@dataclass(frozen=True)
class Trainer:
    """Sizes of a run in plain units; conf/trainer says what each means."""

    steps: int
    prompts_per_step: int
    group: int
    max_new_tokens: int
    temperature: float
    clip: float
    kl_weight: float
    inner_steps: int
    micro_batch: int
    prompts_per_forward: int
    checkpoint_every: int
    checkpoints_kept: int
    sampled_rollouts: int
    audit_every: int
    threads: int

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts_per_step": 1, "group": 2, "max_new_tokens": 1, "inner_steps": 1, "micro_batch": 1,
                 "prompts_per_forward": 1, "checkpoint_every": 1, "checkpoints_kept": 0,
                 "sampled_rollouts": 0, "audit_every": 1, "threads": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"trainer.{name} must be at least {low}; got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"trainer.temperature must be positive; got {self.temperature}")

    def loss(self) -> PolicyLoss:
        return PolicyLoss(self.clip, self.kl_weight, self.prompts_per_step * self.group * self.max_new_tokens)


class MaskSource(Protocol):
    kind: str
    reads: tuple[str, ...]
    pilot_batches: int  # of the untrained policy that it wants to see before step 0

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]: ...

    def facts(self, memory: Memory) -> dict[str, float]: ...


class Prompt(Protocol):
    def __call__(self, problem: Problem) -> str: ...

    def train(self, problem: Problem) -> str: ...


class Sampling(Protocol):
    def during(self, policy: Policy) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Line:
    """One object per stage. `audit` may look at everything and gives nothing back; `ceiling` says who hacks, and is there only in
    a run that says `uses_oracle: true`."""

    seed: int
    policy: Policy
    problems: list[Problem]
    prompt: Prompt
    sampling: Sampling
    extra_rollouts: object
    grader: Grader
    mask_source: MaskSource
    advantage: Callable[[Tensor, Tensor, Tensor], Tensor]
    projection: Projection
    optimizer: object
    trainer: Trainer
    audit: Audit | None
    ceiling: Truth | None = None
    rollout: Engine = OWN


@dataclass
class State:
    """What changes from step to step, and so belongs in a checkpoint."""

    optimizer: Optimizer
    step: int = 0  # the next step to run
    fit: Fit | None = None
    memory: Memory = field(default_factory=dict)  # what the mask source keeps
    fit_overlap: float = field(default=math.nan)  # with the fit before it


def train_step(line: Line, state: State) -> dict[str, float]:
    """One GRPO step; returns its metrics (names in log.py)."""
    t, step = line.trainer, state.step
    refresh(line, state)
    problems = batch_of(line, step)
    prompts = [line.prompt(problem) for problem in problems]
    extra = line.extra_rollouts(line.policy, prompts, t.group, (line.seed, "extra", step))
    with line.sampling.during(line.policy):
        rollouts = fill_groups(line.policy, prompts, seats(line, step), t.group, extra, (line.seed, "rollout", step), t.max_new_tokens,
                               t.temperature, t.prompts_per_forward, line.rollout, begin_with(line.grader, problems))
    rollouts = retold(line.policy, rollouts, prompts, [line.prompt.train(problem) for problem in problems])
    grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts])
    view = view_of(line, state.step, problems, rollouts, grades, state.fit)

    first, decision = differentiate(line, state, view)
    aside = line.extra_rollouts.aside(view, t, (line.seed, "aside"))
    if line.audit is not None:
        line.audit(step, [problems[r.group] for r in rollouts], rollouts, grades, diagnosed(decision, first, state.fit))
    result, lr, basis = first, line.optimizer.rate(step, t.steps), view.basis
    for inner in range(t.inner_steps):
        if inner:
            result = routed_gradients(line, view, decision, first.old_log_probs)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"loss is {result.loss} at step {step}; lower optimizer.lr or look at rollouts.jsonl")
        update = aside.added(line.projection.gradient(summed(result, decision), basis))
        applied, norms = state.optimizer.step(update, lr, aside.added(natural(decision, result)),
                                              aside.taking_part(decision.participation))
        final = line.projection.step(applied, basis)
        if final is not applied:
            replace_step(line.policy, applied, final)
    state.step += 1
    about = {"train/lr": lr, "train/gradient_norm": norms.get(DEPLOYED, 0.0)} | aside.facts
    return (measure(rollouts, grades, view.rewards, t.group, first, line.policy, about)
            | (measure_blocks(decision, norms, final, state.optimizer.facts, rollouts) if line.policy.adapter.has_quarantine
               or line.mask_source.kind == "rollout" else {})
            | {f"route/{name}": value for name, value in line.mask_source.facts(state.memory).items()}
            | measure_subspace(line, state, rollouts, first, update, final) | line.rollout.facts())


def measure_subspace(line: Line, state: State, rollouts: list[Rollout], first: GradientResult, update: Update,
                     final: Update) -> dict[str, float]:
    """What the step has to do with the subspace that a source of such a kind gave."""
    if state.fit is None:
        return {}
    if isinstance(state.fit.basis, Trusted):
        return measure_trusted(state.fit, first, line.policy.adapter, final)
    return measure_direction(rollouts, first, state, update, final)


def batch_of(line: Line, step: int) -> list[Problem]:
    """Problems of a step: the seed's shuffle of the whole set, epoch after epoch; the same for every arm of a seed. Those of
    anchor groups follow, from a shuffle of their own."""
    return (draw(line, "problems", step, line.trainer.prompts_per_step)
            + draw(line, "anchors", step, line.extra_rollouts.groups))


def draw(line: Line, stream: str, step: int, count: int) -> list[Problem]:
    chosen, total = [], len(line.problems)
    for place in range(step * count, (step + 1) * count):
        epoch, position = divmod(place, total)
        chosen.append(line.problems[shuffled(f"{line.seed}/{stream}/{epoch}", total)[position]])
    return chosen


@lru_cache(maxsize=4)  # an epoch lasts many steps
def shuffled(seed: str, total: int) -> list[int]:
    """An order of `total` problems."""
    return random.Random(seed).sample(range(total), total)


def seats(line: Line, step: int) -> list[Seat]:
    """How each group is sampled: the step's own as the projection says, anchors with the quarantine off."""
    own = line.projection.scales(line.trainer.prompts_per_step, (line.seed, "scales", step))
    return [Seat(STUDENT, scale) for scale in own] + [Seat(ANCHOR, 0.0)] * line.extra_rollouts.groups


def view_of(line: Line, step: int, problems: list[Problem], rollouts: list[Rollout], grades: list[Grade] | None,
            fit: Fit | None) -> StepView:
    """What a mask source sees of these rollouts; without grades (a pilot that nobody grades) the rewards are nan."""
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], line.policy.pad, line.policy.device)
    seen = [(grade.reward, grade.format_ok, grade.passed) for grade in grades] if grades else [(math.nan,) * 3] * len(rollouts)
    paid = torch.tensor(seen, dtype=torch.float32).T.to(line.policy.device)

    def ceiling() -> Tensor:
        return line.ceiling([problems[r.group] for r in rollouts], rollouts, grades)

    return StepView(step, rollouts, tokens, paid[0], line.policy, fit.basis if fit else None, None, ceiling if line.ceiling else None,
                    paid[1:])


def pilot(line: Line) -> Memory:
    """What the mask source learns from batches of the policy as it stands, before the first step; they train nothing."""
    t, views = line.trainer, []
    for batch in range(line.mask_source.pilot_batches):
        problems = draw(line, "pilot", batch, t.prompts_per_step)
        prompts = [line.prompt(problem) for problem in problems]
        rollouts = sample_rollouts(line.policy, prompts, [t.group] * len(prompts), (line.seed, "pilot", batch), t.max_new_tokens,
                                   t.temperature, t.prompts_per_forward)
        reads = line.mask_source.reads
        grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts]) if "rewards" in reads else None
        view = view_of(line, batch - line.mask_source.pilot_batches, problems, rollouts, grades, None)
        if "gradients" in reads:
            view = replace(view, grads=unit_gradients(line, view, torch.ones_like(view.rewards)).grads[DEPLOYED])
        views.append(view)
    return line.policy.world.first("a pilot", line.mask_source.prepare(views))


def refresh(line: Line, state: State) -> None:
    """Prepare the mask source before the first step, and fit a subspace again every `refresh_every` steps."""
    source = line.mask_source
    if source.pilot_batches and not state.memory:
        state.memory = pilot(line)
    if source.kind not in ("subspace", "trusted"):
        return
    if state.fit is None or (source.refresh_every and state.step % source.refresh_every == 0):
        before, state.fit = state.fit, line.policy.world.first("a fit", source.fit(line.policy))
        state.fit_overlap = overlap(before.basis, state.fit.basis) if before else math.nan
        if before:
            check_overlap(state.fit_overlap, source.overlap_floor, source.when_stale, state.step)


@torch.no_grad()
def replace_step(policy: Policy, applied: Update, final: Update) -> None:
    """Put the parameters where `final` leads from where `applied` started."""
    for block, vectors in final.items():
        now, taken = policy.adapter.flatten(block), applied.get(block, {})
        policy.adapter.load_flat({name: flat + taken.get(name, 0) - vectors.get(name, 0)
                                  for name, flat in now.items()}, block)
