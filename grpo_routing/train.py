"""THE LINE: vanilla GRPO in the order of the paper's algorithm box. Every method is another object at one of its stages.

    problems -> prompt -> ROLLOUT (+ extra) -> GRADE -> MASK -> ADVANTAGE -> per-rollout GRADIENT -> PROJECT -> STEP
                                                 └─ tee -> audit (returns None)

MASK and ADVANTAGE may come after the GRADIENT, with the same result: a rollout's gradient is its advantage times that of
advantage 1, so masks that read gradients cost no second backward.

The line never learns what is true: it has no verdict, and the audit that computes one returns nothing.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.env.grader import Grade, Grader
from grpo_routing.env.problems import Problem
from grpo_routing.gradient import Forward, GradientResult, PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.direction import DirectionSource, Fit, overlap
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.optimizers import Optimizer
from grpo_routing.policy import Policy
from grpo_routing.projections.projection import Projection
from grpo_routing.projections.subspace import Update, fired_share, hackward_share
from grpo_routing.rollout import Seat, fill_groups, sample_rollouts
from grpo_routing.types import ANCHOR, STUDENT, TEACHER, Labels, Rollout, RolloutGrads, TokenBatch, Weights

log = logging.getLogger("grpo_routing")
STALE = 0.2  # a refitted basis that shares less than this with the one before it deserves a warning
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
    sampled_rollouts: int
    audit_every: int
    threads: int

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts_per_step": 1, "group": 2, "max_new_tokens": 1, "inner_steps": 1, "micro_batch": 1,
                 "prompts_per_forward": 1, "checkpoint_every": 1, "sampled_rollouts": 0, "audit_every": 1, "threads": 0}
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


@dataclass(frozen=True)
class Line:
    """One object per stage. `audit` may look at everything and gives nothing back."""

    seed: int
    policy: Policy
    problems: list[Problem]
    prompt: Callable[[Problem], str]
    extra_rollouts: object
    grader: Grader
    mask_source: MaskSource
    advantage: Callable[[Tensor, Tensor, Tensor], Tensor]
    projection: Projection
    optimizer: object
    trainer: Trainer
    audit: Audit | None


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
    rollouts = fill_groups(line.policy, prompts, seats(line, step), t.group, extra, (line.seed, "rollout", step), t.max_new_tokens,
                           t.temperature, t.prompts_per_forward)
    grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts])
    view = view_of(line, state.step, rollouts, grades, state.fit)

    first, decision = differentiate(line, state, view)
    if line.audit is not None:
        line.audit(step, [problems[r.group] for r in rollouts], rollouts, grades, decision.labels)
    result, lr, basis = first, line.optimizer.rate(step, t.steps), view.basis
    for inner in range(t.inner_steps):
        if inner:
            result = rollout_gradients(line.policy, view.tokens, decision.routed, t.loss(), t.micro_batch, first.old_log_probs,
                                       line.projection.blocks, decision.forward)
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"loss is {result.loss} at step {step}; lower optimizer.lr or look at rollouts.jsonl")
        update = line.projection.gradient(summed(result, decision), basis)
        applied, norms = state.optimizer.step(update, lr, natural(decision, result), decision.participation)
        final = line.projection.step(applied, basis)
        if final is not applied:
            replace_step(line.policy, applied, final)
    state.step += 1
    about = {"train/lr": lr, "train/gradient_norm": norms.get(DEPLOYED, 0.0)}
    return (measure(rollouts, grades, view.rewards, t.group, first, line.policy, about)
            | (measure_blocks(decision, norms, final, state.optimizer.facts, rollouts) if line.policy.adapter.has_quarantine
               or line.mask_source.kind == "rollout" else {})
            | (measure_direction(rollouts, first, state, update, final) if state.fit else {}))


def batch_of(line: Line, step: int) -> list[Problem]:
    """Problems of a step: the seed's shuffle of the whole set, epoch after epoch; the same for every arm of a seed. Those of
    anchor groups follow, from a shuffle of their own."""
    return (draw(line, "problems", step, line.trainer.prompts_per_step)
            + draw(line, "anchors", step, line.extra_rollouts.groups))


def draw(line: Line, stream: str, step: int, count: int) -> list[Problem]:
    chosen, total = [], len(line.problems)
    for place in range(step * count, (step + 1) * count):
        epoch, position = divmod(place, total)
        order = random.Random(f"{line.seed}/{stream}/{epoch}").sample(range(total), total)
        chosen.append(line.problems[order[position]])
    return chosen


def seats(line: Line, step: int) -> list[Seat]:
    """How each group is sampled: the step's own as the projection says, anchors with the quarantine off."""
    own = line.projection.scales(line.trainer.prompts_per_step, (line.seed, "scales", step))
    return [Seat(STUDENT, scale) for scale in own] + [Seat(ANCHOR, 0.0)] * line.extra_rollouts.groups


def view_of(line: Line, step: int, rollouts: list[Rollout], grades: list[Grade], fit: Fit | None) -> StepView:
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], line.policy.pad, line.policy.device)
    rewards = torch.tensor([grade.reward for grade in grades]).to(line.policy.device)
    return StepView(step, rollouts, tokens, rewards, line.policy, fit.basis if fit else None, None)


# --------------------------------------------------------------------------- what is decided about rollouts, and their gradients


@dataclass(frozen=True)
class Decision:
    """Everything that labels decide about the rollouts of a step, [B] each."""

    labels: Labels
    weights: Weights
    routed: Tensor  # advantage behind the first moment
    natural: Tensor  # advantage behind the second; the same object unless the rule has two streams
    forward: Forward
    blocks: tuple[str, ...]  # that some rollout trains
    unmasked: dict[str, RolloutGrads] | None  # gradients at the natural advantage, where it is another

    @property
    def participation(self) -> dict[str, float]:
        """Share of the rollouts that train a block."""
        return {block: float((self.weights.of(block) != 0).float().mean()) for block in self.blocks}


def decide(line: Line, state: State, view: StepView) -> Decision:
    """Labels, then rewards under the anchors' rule, weights and advantages. Remembers what the source remembers."""
    labels, state.memory = line.mask_source.label(view, state.memory)
    quarantine = torch.tensor([r.quarantine for r in view.rollouts], dtype=view.rewards.dtype, device=view.rewards.device)
    rewards, judged = line.extra_rollouts.edit(view.rollouts, view.rewards, labels)
    weights = line.projection.weights(judged, quarantine, line.policy.adapter)
    grouped = [tensor.view(-1, line.trainer.group) for tensor in (rewards, judged.flagged, weights.deployed)]
    routed = line.advantage(*grouped).flatten()
    natural = line.advantage.natural(*grouped[:2]).flatten() if line.advantage.two_streams else routed
    forward = Forward(quarantine, line.projection.passes(judged), line.projection.stop_at,
                      line.projection.aid(judged, quarantine, line.policy.adapter))
    trained = tuple(block for block in line.projection.blocks if bool((weights.of(block) != 0).any()))
    return Decision(labels, weights, routed, natural, forward, trained, None)


def differentiate(line: Line, state: State, view: StepView) -> tuple[GradientResult, Decision]:
    """The gradient of every rollout, from one backward, and what was decided about it.

    Where a decision depends on gradients, or two advantages share them, the backward is of advantage 1 and everything is
    decided after it; else before it, and rollouts without advantage cost nothing. Both give the same gradients (T43b).
    """
    loss, blocks = line.trainer.loss(), line.projection.blocks
    late = "gradients" in line.mask_source.reads or line.advantage.two_streams
    if not late:
        decision = decide(line, state, view)
        return rollout_gradients(line.policy, view.tokens, decision.routed, loss, line.trainer.micro_batch, None, blocks,
                                 decision.forward), decision
    quarantine = torch.tensor([r.quarantine for r in view.rollouts], dtype=view.rewards.dtype, device=view.rewards.device)
    unit = rollout_gradients(line.policy, view.tokens, alive(line, view).to(view.rewards), replace(loss, kl_weight=0.0),
                             line.trainer.micro_batch, None, blocks, Forward(quarantine))
    decision = decide(line, state, replace(view, grads=unit.grads[DEPLOYED]))
    if loss.kl_weight:  # the penalty does not scale with the advantage, so its gradient needs a backward of its own
        return rollout_gradients(line.policy, view.tokens, decision.routed, loss, line.trainer.micro_batch, None, blocks,
                                 decision.forward), decision
    if line.advantage.two_streams:
        decision = replace(decision, unmasked={block: rows.scaled(decision.natural) for block, rows in unit.grads.items()})
    return unit.scaled(decision.routed), decision


def alive(line: Line, view: StepView) -> Tensor:
    """Rollouts that may get an advantage, [B] bool: all but those of groups whose rewards are equal."""
    groups = view.rewards.view(-1, line.trainer.group)
    varied = (groups.max(1).values != groups.min(1).values).repeat_interleave(line.trainer.group)
    anchors = torch.tensor([r.source == ANCHOR for r in view.rollouts], device=varied.device)  # their rule edits rewards
    return varied | anchors if line.advantage.flat_is_zero else torch.ones_like(varied)


def summed(result: GradientResult, decision: Decision) -> Update:
    """The routed sum: each rollout's gradient with its weight, for every block that some rollout trains."""
    return {block: result.grads[block].summed(decision.weights.of(block)) for block in decision.blocks}


def natural(decision: Decision, result: GradientResult) -> Update:
    """The natural sum: the same gradients without any mask."""
    grads = decision.unmasked or result.grads
    return {block: grads[block].summed() for block in decision.blocks}


def pilot(line: Line) -> Memory:
    """What the mask source learns from batches of the policy as it stands, before the first step; they train nothing."""
    t, views = line.trainer, []
    for batch in range(line.mask_source.pilot_batches):
        problems = draw(line, "pilot", batch, t.prompts_per_step)
        prompts = [line.prompt(problem) for problem in problems]
        rollouts = sample_rollouts(line.policy, prompts, [t.group] * len(prompts), (line.seed, "pilot", batch), t.max_new_tokens,
                                   t.temperature, t.prompts_per_forward)
        grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts])
        views.append(view_of(line, batch - line.mask_source.pilot_batches, rollouts, grades, None))
    return line.mask_source.prepare(views)


def refresh(line: Line, state: State) -> None:
    """Prepare the mask source before the first step, and fit a direction again every `refresh_every` steps."""
    if line.mask_source.pilot_batches and not state.memory:
        state.memory = pilot(line)
    if not isinstance(line.mask_source, DirectionSource):
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


def measure(rollouts: list[Rollout], grades: list[Grade], rewards: Tensor, group: int, result: GradientResult, policy: Policy,
            step: dict[str, float]) -> dict[str, float]:
    """What the line knows about the step; what is true about the rollouts is the audit's business."""
    lengths, groups = [len(rollout.completion_ids) for rollout in rollouts], rewards.view(-1, group)
    surprise = [-log_prob for rollout in rollouts for log_prob in rollout.sampler_log_probs]
    metrics = {
        "train/reward": float(rewards.mean()),
        "train/passed": sum(grade.passed for grade in grades) / len(grades),
        "train/format": sum(grade.format_ok for grade in grades) / len(grades),
        "train/flat_groups": float((groups.max(1).values - groups.min(1).values < 1e-9).float().mean()),
        "train/loss": result.loss,
        "train/ratio": result.ratio,
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/entropy": sum(surprise) / max(1, len(surprise)),
        "rollout/teacher_share": sum(r.source == TEACHER for r in rollouts) / len(rollouts),
        "rollout/sampler_gap": sampler_gap(rollouts, result.old_log_probs),
    } | step | {f"train/norm_{block}": policy.adapter.norm(block) for block in policy.adapter.blocks}
    return metrics if math.isnan(result.kl) else metrics | {"train/kl": result.kl}


def measure_blocks(decision: Decision, norms: dict[str, float], final: Update, facts: dict[str, float],
                   rollouts: list[Rollout]) -> dict[str, float]:
    """Shares of the labels, and what each block was given and did."""
    flagged, trusted = decision.labels.flagged, decision.labels.trusted
    anchors = torch.tensor([r.source == ANCHOR for r in rollouts], device=flagged.device)
    off = torch.tensor([r.quarantine == 0 for r in rollouts], device=flagged.device)
    own = ~anchors
    kept = own & (trusted | off)
    shares = {"flagged": flagged[own], "kept": kept[own].float(), "absorbed": ((1 - flagged) * ~kept)[own], "flagged_anchors": flagged[anchors],
              "flagged_off": flagged[off & own]}
    metrics = {f"route/{name}": float(values.mean()) for name, values in shares.items() if len(values)}
    metrics |= {f"train/gradient_norm_{block}": norm for block, norm in norms.items()}
    metrics |= {f"train/update_norm_{block}": math.sqrt(sum(float(v.square().sum()) for v in own.values())) for block, own in final.items()}
    return metrics | {f"train/{name}": value for name, value in facts.items()}


def measure_direction(rollouts: list[Rollout], result: GradientResult, state: State, update: Update,
                      final: Update) -> dict[str, float]:
    """How much of the gradient, of its student and teacher parts and of the applied step lies along the basis."""
    own, basis = torch.tensor([rollout.source == STUDENT for rollout in rollouts]), state.fit.basis
    grads = result.grads[DEPLOYED]
    whole = grads.summed()
    metrics = {
        "route/cin": hackward_share(whole, basis),
        "route/cin_student": hackward_share(grads.summed(own), basis),
        "route/fired": fired_share(whole, basis),
    }
    if DEPLOYED in update:
        metrics |= {"route/cout": hackward_share(update[DEPLOYED], basis), "route/step_overlap": hackward_share(final[DEPLOYED], basis)}
    if not bool(own.all()):
        metrics["route/cin_teacher"] = hackward_share(grads.summed(~own), basis)
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
