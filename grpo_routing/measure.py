"""What the line knows about a step, as metrics (names in log.py). What is true about the rollouts is the audit's business."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, Adapter
from grpo_routing.decision import Decision
from grpo_routing.drift import canonical, left_directions
from grpo_routing.env.grader import Grade
from grpo_routing.gradient import GradientResult
from grpo_routing.mask_sources.direction import Fit, alignment
from grpo_routing.policy import Policy
from grpo_routing.projections.restrict import trusted_share
from grpo_routing.projections.subspace import Update, fired_share, hackward_share
from grpo_routing.types import ANCHOR, STUDENT, TEACHER, Labels, Rollout, Trusted

if TYPE_CHECKING:
    from grpo_routing.train import State


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
    shares = {"flagged": flagged[own], "kept": kept[own].float(), "absorbed": ((1 - flagged) * ~kept)[own],
              "flagged_anchors": flagged[anchors], "flagged_off": flagged[off & own]}
    metrics = {f"route/{name}": float(values.mean()) for name, values in shares.items() if len(values)}
    metrics |= {f"train/gradient_norm_{block}": norm for block, norm in norms.items()}
    metrics |= {f"train/update_norm_{block}": math.sqrt(sum(float(v.square().sum()) for v in own.values())) for block, own in final.items()}
    return metrics | {f"train/{name}": value for name, value in facts.items()}


def diagnosed(decision: Decision, result: GradientResult, fit: Fit | None) -> Labels:
    """The labels with a score for the audit. A hack basis flags no rollout, but says how hack-ward each one's gradient is: the
    cosine at advantage 1, so that of the live gradient times the sign of its advantage; nan where that is zero."""
    if fit is None or isinstance(fit.basis, Trusted):
        return decision.labels
    return replace(decision.labels, scores=alignment(result.grads[DEPLOYED], fit.basis) * decision.routed.sign())


def measure_trusted(fit: Fit, result: GradientResult, adapter: Adapter, final: Update) -> dict[str, float]:
    """How much of the gradient and of the step lies in the trusted directions, and how far the update so far has drifted from them."""
    ours = {name: module.delta(DEPLOYED).detach() for name, module in adapter.modules.items()}
    drift = [canonical(fit.basis.modules[name], left_directions(update, fit.basis.modules[name].shape[1]))
             for name, update in ours.items() if float(update.norm()) > 0]
    return {"route/trusted_share": trusted_share(result.grads[DEPLOYED].summed(), fit.basis),
            "route/trusted_step": trusted_share(final[DEPLOYED], fit.basis)} | (
        {"route/trusted_cca": sum(drift) / len(drift), "route/trusted_cca_worst": min(drift)} if drift else {}) | {
        f"route/{name}": value for name, value in fit.facts.items()}


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
