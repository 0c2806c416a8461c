"""What labels decide about the rollouts of a step, and the gradients that the decision is about.

    labels -> rewards under the anchors' rule -> weights per block -> advantages
    routed sum    each rollout's gradient times its weight, per block
    natural sum   the same gradients without any mask; split_moment's second moment

A rollout's gradient is its advantage times that of advantage 1 (beta = 0, ratio 1), so all of this may come after the one
backward, and must when a mask reads gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.gradient import Forward, GradientResult, rollout_gradients
from grpo_routing.mask_sources.direction import direction
from grpo_routing.mask_sources.view import StepView
from grpo_routing.projections.subspace import Update
from grpo_routing.types import ANCHOR, STUDENT, Asked, Basis, Labels, Weights

if TYPE_CHECKING:
    from grpo_routing.train import Line, State


@dataclass(frozen=True)
class Decision:
    """Everything that labels decide about the rollouts of a step, [B] each."""

    labels: Labels
    weights: Weights
    routed: Tensor  # advantage behind the first moment
    natural: Tensor  # advantage behind the second; the same object unless the rule has two streams
    forward: Forward
    blocks: tuple[str, ...]  # that some rollout trains
    unmasked: Update | None  # the natural sum, where the natural advantage is another

    @property
    def participation(self) -> dict[str, float]:
        """Share of the rollouts that train a block."""
        return {block: float((self.weights.of(block) != 0).float().mean()) for block in self.blocks}


def decide(line: Line, state: State, view: StepView) -> Decision:
    """Labels, then rewards under the anchors' rule, weights and advantages. Remembers what the source remembers."""
    labels, memory = line.mask_source.label(view, state.memory)
    changed = {name: value for name, value in memory.items() if state.memory.get(name) is not value}
    labels, changed = line.policy.world.first("labels", (labels, changed))  # others may have rounded otherwise
    state.memory = memory | changed
    quarantine = torch.tensor([r.quarantine for r in view.rollouts], dtype=view.rewards.dtype, device=view.rewards.device)
    rewards, judged = line.extra_rollouts.edit(view.rollouts, view.rewards, labels)
    weights = line.projection.weights(judged, quarantine, line.policy.adapter, line.trainer.group)
    grouped = [tensor.view(-1, line.trainer.group) for tensor in (rewards, judged.flagged, weights.deployed)]
    more = {"scores": labels.scores if labels.scores is not None else labels.flagged, "terms": view.terms}
    own = {name: more[name].view(*more[name].shape[:-1], -1, line.trainer.group) for name in line.advantage.reads if name in more}
    routed = line.advantage(*grouped, **own).flatten()
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
    loss = line.trainer.loss()
    late = "gradients" in line.mask_source.reads or line.advantage.two_streams
    if not late:
        decision = decide(line, state, view)
        return routed_gradients(line, view, decision, None), decision
    unit = unit_gradients(line, view, alive(line, view).to(view.rewards))
    decision = decide(line, state, replace(view, grads=unit.grads[DEPLOYED]))
    if loss.kl_weight:  # the penalty does not scale with the advantage, so its gradient needs a backward of its own
        return routed_gradients(line, view, decision, None), decision
    if line.advantage.two_streams:
        decision = replace(decision, unmasked={block: rows.summed(decision.natural) for block, rows in unit.grads.items()})
    return unit.scaled(decision.routed, asked(line, view, decision)), decision


def routed_gradients(line: Line, view: StepView, decision: Decision, old_log_probs: Tensor | None) -> GradientResult:
    """What the step asks of the rollouts' gradients, at the advantages that were decided."""
    return rollout_gradients(line.policy, view.tokens, decision.routed, line.trainer.loss(), line.trainer.micro_batch, old_log_probs,
                             line.projection.blocks, decision.forward, asked(line, view, decision))


def asked(line: Line, view: StepView, decision: Decision) -> dict[str, Asked]:
    """Per block the natural and the routed sum; with a hack basis those of both kinds of rollouts too, and the alignment with it of the
    rollouts that the audit will judge (its stride is a setting: what it finds never comes back)."""
    ones = torch.ones_like(view.rewards)
    sums = {block: [ones, decision.weights.of(block)] for block in line.projection.blocks}
    axes = direction(view.basis) if isinstance(view.basis, Basis) else None
    if axes:
        own = torch.tensor([rollout.source == STUDENT for rollout in view.rollouts], device=ones.device)
        sums[DEPLOYED] += [] if bool(own.all()) else [own.to(ones), (~own).to(ones)]
    judged = torch.arange(len(ones), device=ones.device) % line.trainer.audit_every == view.step % line.trainer.audit_every
    return {block: Asked(distinct(weights), *((axes, judged) if axes and block == DEPLOYED else ())) for block, weights in sums.items()}


def distinct(sets: list[Tensor]) -> list[Tensor]:
    """Without repetitions: what is equal is summed once."""
    return [one for place, one in enumerate(sets) if not any(torch.equal(one, before) for before in sets[:place])]


def unit_gradients(line: Line, view: StepView, ones: Tensor) -> GradientResult:
    """Gradients at advantage 1 of the rollouts that `ones` [B] names, without a KL penalty; zero for the others."""
    quarantine = torch.tensor([r.quarantine for r in view.rollouts], dtype=view.rewards.dtype, device=view.rewards.device)
    return rollout_gradients(line.policy, view.tokens, ones, replace(line.trainer.loss(), kl_weight=0.0), line.trainer.micro_batch,
                             None, line.projection.blocks, Forward(quarantine))


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
    return {block: decision.unmasked[block] if decision.unmasked else result.grads[block].summed() for block in decision.blocks}
