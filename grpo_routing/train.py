"""THE LINE: vanilla GRPO in the order of the paper's algorithm box. Every method is another object at one of its stages.

    problems -> prompt -> ROLLOUT (+ extra) -> GRADE -> ADVANTAGE -> per-rollout GRADIENT -> MASK -> PROJECT -> STEP
                                                 └─ tee -> audit (returns None)

The line never learns what is true: it has no verdict, and the audit that computes one returns nothing.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.env.grader import Grade, Grader
from grpo_routing.env.problems import Problem
from grpo_routing.gradient import GradientResult, PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.direction import Fit, overlap
from grpo_routing.optimizers import Optimizer
from grpo_routing.policy import Policy
from grpo_routing.projections.subspace import Update, fired_share, hackward_share
from grpo_routing.rollout import fill_groups
from grpo_routing.types import STUDENT, TEACHER, Rollout, TokenBatch

log = logging.getLogger("grpo_routing")
STALE = 0.2  # a refitted basis that shares less than this with the one before it deserves a warning
Audit = Callable[[int, list[Problem], list[Rollout], list[Grade]], None]


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
    sampled_rollouts: int
    threads: int

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts_per_step": 1, "group": 2, "max_new_tokens": 1, "inner_steps": 1, "micro_batch": 1,
                 "prompts_per_forward": 1, "checkpoint_every": 1, "sampled_rollouts": 0, "threads": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"trainer.{name} must be at least {low}; got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"trainer.temperature must be positive; got {self.temperature}")

    def loss(self) -> PolicyLoss:
        return PolicyLoss(self.clip, self.kl_weight, self.prompts_per_step * self.group * self.max_new_tokens)


class MaskSource(Protocol):
    kind: str
    refresh_every: int

    def fit(self, policy: Policy) -> Fit: ...


@dataclass(frozen=True)
class Line:
    """One object per stage. `audit` may look at everything and gives nothing back."""

    seed: int
    policy: Policy
    problems: list[Problem]
    prompt: Callable[[Problem], str]
    extra_rollouts: Callable[..., list[Rollout]]
    grader: Grader
    mask_source: MaskSource
    advantage: Callable[[Tensor], Tensor]
    projection: object
    optimizer: object
    trainer: Trainer
    audit: Audit | None


@dataclass
class State:
    """What changes from step to step, and so belongs in a checkpoint."""

    optimizer: Optimizer
    step: int = 0  # the next step to run
    fit: Fit | None = None
    fit_overlap: float = field(default=math.nan)  # with the fit before it


def train_step(line: Line, state: State) -> dict[str, float]:
    """One GRPO step; returns its metrics (names in log.py)."""
    t, step = line.trainer, state.step
    problems = batch_of(line, step)
    prompts = [line.prompt(problem) for problem in problems]
    extra = line.extra_rollouts(line.policy, prompts, t.group, (line.seed, "extra", step))
    rollouts = fill_groups(line.policy, prompts, t.group, extra, (line.seed, "rollout", step), t.max_new_tokens,
                           t.temperature, t.prompts_per_forward)
    grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts])
    if line.audit is not None:
        line.audit(step, [problems[r.group] for r in rollouts], rollouts, grades)
    rewards = torch.tensor([grade.reward for grade in grades]).view(len(prompts), t.group)
    advantages = line.advantage(rewards).flatten().to(line.policy.device)
    refresh(line, state)
    basis = state.fit.basis if state.fit else None

    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], line.policy.pad, line.policy.device)
    old_log_probs, lr = None, line.optimizer.rate(step, t.steps)
    for inner in range(t.inner_steps):
        result = rollout_gradients(line.policy, tokens, advantages, t.loss(), t.micro_batch, old_log_probs)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"loss is {result.loss} at step {step}; lower optimizer.lr or look at rollouts.jsonl")
        update = line.projection.gradient(result.grads.summed(), basis)
        applied, norm = state.optimizer.step(update, lr)
        final = line.projection.step(applied, basis)
        if final is not applied:
            replace_step(line.policy, applied, final)
        if inner == 0:
            first, old_log_probs = result, result.old_log_probs
    state.step += 1
    return measure(rollouts, grades, rewards, first, line.policy, {"train/lr": lr, "train/gradient_norm": norm}) | (
        measure_direction(rollouts, first, state, update, final) if state.fit else {})


def batch_of(line: Line, step: int) -> list[Problem]:
    """Problems of a step: the seed's shuffle of the whole set, epoch after epoch; the same for every arm of a seed."""
    count, total = line.trainer.prompts_per_step, len(line.problems)
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, position = divmod(place, total)
        order = random.Random(f"{line.seed}/problems/{epoch}").sample(range(total), total)
        chosen.append(line.problems[order[position]])
    return chosen


def refresh(line: Line, state: State) -> None:
    """Fit the mask source before the first step, and again every `refresh_every` steps."""
    if line.mask_source.kind != "subspace":
        return
    every = line.mask_source.refresh_every
    if state.fit is None or (every and state.step % every == 0):
        before, state.fit = state.fit, line.mask_source.fit(line.policy)
        state.fit_overlap = overlap(before.basis, state.fit.basis) if before else math.nan
        if state.fit_overlap < STALE:
            log.warning("step %d: the refitted basis shares %.2f with the one before it (1 is the same); between refits it was "
                        "mostly stale. Lower mask_source.refresh_every", state.step, state.fit_overlap)


@torch.no_grad()
def replace_step(policy: Policy, applied: Update, final: Update) -> None:
    """Put the parameters where `final` leads from where `applied` started."""
    for block, vectors in final.items():
        now, taken = policy.adapter.flatten(block), applied.get(block, {})
        policy.adapter.load_flat({name: flat + taken.get(name, 0) - vectors.get(name, 0)
                                  for name, flat in now.items()}, block)


def measure(rollouts: list[Rollout], grades: list[Grade], rewards: Tensor, result: GradientResult, policy: Policy,
            step: dict[str, float]) -> dict[str, float]:
    """What the line knows about the step; what is true about the rollouts is the audit's business."""
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    metrics = {
        "train/reward": float(rewards.mean()),
        "train/passed": sum(grade.passed for grade in grades) / len(grades),
        "train/format": sum(grade.format_ok for grade in grades) / len(grades),
        "train/flat_groups": float((rewards.max(1).values - rewards.min(1).values < 1e-9).float().mean()),
        "train/loss": result.loss,
        "train/ratio": result.ratio,
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/teacher_share": sum(r.source == TEACHER for r in rollouts) / len(rollouts),
        "rollout/sampler_gap": sampler_gap(rollouts, result.old_log_probs),
    } | step | {f"train/norm_{block}": policy.adapter.norm(block) for block in policy.adapter.blocks}
    return metrics if math.isnan(result.kl) else metrics | {"train/kl": result.kl}


def measure_direction(rollouts: list[Rollout], result: GradientResult, state: State, update: Update,
                      final: Update) -> dict[str, float]:
    """How much of the gradient, of its student and teacher parts and of the applied step lies along the basis."""
    own, basis = torch.tensor([rollout.source == STUDENT for rollout in rollouts]), state.fit.basis
    whole = result.grads.summed()
    metrics = {
        "route/cin": hackward_share(whole, basis),
        "route/cin_student": hackward_share(result.grads.summed(own), basis),
        "route/cout": hackward_share(update[DEPLOYED], basis),
        "route/step_overlap": hackward_share(final[DEPLOYED], basis),
        "route/fired": fired_share(whole, basis),
    }
    if not bool(own.all()):
        metrics["route/cin_teacher"] = hackward_share(result.grads.summed(~own), basis)
    if not math.isnan(state.fit_overlap):
        metrics["route/fit_overlap"] = state.fit_overlap
    return metrics | {f"route/{name}": value for name, value in state.fit.facts.items()}


def sampler_gap(rollouts: list[Rollout], old_log_probs: Tensor) -> float:
    """Largest |log-prob of the sampler - log-prob of the gradient forward| over sampled tokens that were computed."""
    worst = 0.0
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) - 1
        own = old_log_probs[row, start : start + len(rollout.completion_ids)]
        if rollout.sampler_log_probs and bool(own.any()):
            worst = max(worst, float((own.cpu() - torch.tensor(rollout.sampler_log_probs)).abs().max()))
    return worst
