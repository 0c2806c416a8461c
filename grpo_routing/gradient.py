"""One exact gradient per rollout, all from one backward (architecture.md §5).

    loss of rollout i:  -(1/Z) sum_t [ min(rho_t A_i, clip(rho_t) A_i) - beta K3_t ]      Z = prompts * group * max_new_tokens

Z is a constant (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783): it depends neither on lengths nor on masks, so the
micro-batch size cannot change a result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import flat_gradient
from grpo_routing.policy import Policy
from grpo_routing.types import RolloutGrads, TokenBatch


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate with an optional K3 penalty towards the base model (adapters off)."""

    clip: float
    kl_weight: float  # beta; 0 switches the reference forward off
    denominator: int  # Z

    def __call__(self, log_probs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor) -> Tensor:
        """Loss per rollout [b] from log-probs [b, T-1] (new, old, reference), advantages [b] and completion mask [b, T-1]."""
        ratio = torch.exp(log_probs - old)
        gain = advantages[:, None]
        surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - self.clip, 1 + self.clip) * gain)
        per_token = -surrogate
        if self.kl_weight:
            gap = reference - log_probs
            per_token = per_token + self.kl_weight * (torch.exp(gap) - gap - 1)  # K3, Schulman 2020
        return torch.where(mask, per_token, 0.0).sum(1) / self.denominator


@dataclass(frozen=True)
class GradientResult:
    grads: RolloutGrads
    loss: float  # summed over the batch
    old_log_probs: Tensor  # [B, T-1], detached; the reference point of further inner steps
    kl: float  # mean K3 over completion tokens, nan when beta is 0
    ratio: float  # mean importance ratio over completion tokens; 1 at the first inner step


def rollout_gradients(policy: Policy, tokens: TokenBatch, advantages: Tensor, loss: PolicyLoss, micro_batch: int,
                      old_log_probs: Tensor | None = None) -> GradientResult:
    """Per-rollout gradients of the deployed block.

    `advantages` is [B]. Rows whose advantage is zero have a zero gradient when beta is 0 and are not computed.
    `old_log_probs` [B, T-1] defaults to the current policy (ratio exactly 1).
    """
    adapter = policy.adapter
    width = tokens.ids.shape[1] - 1
    old_all = advantages.new_zeros(len(tokens), width) if old_log_probs is None else old_log_probs
    modules = {name: advantages.new_zeros(len(tokens), flat.numel()) for name, flat in adapter.flatten().items()}
    active = [row for row in range(len(tokens)) if loss.kl_weight or float(advantages[row]) != 0.0]
    total, kl_sum, ratio_sum, count = 0.0, 0.0, 0.0, 0
    for start in range(0, len(active), micro_batch):
        rows = active[start : start + micro_batch]
        part = tokens.rows(rows)
        reach = part.completion_mask.shape[1]
        with adapter.per_rollout(len(rows)) as leaves:
            log_probs = policy.log_probs(part)
            old = log_probs.detach() if old_log_probs is None else old_log_probs[rows, :reach]
            reference = policy.reference_log_probs(part) if loss.kl_weight else None
            value = loss(log_probs, old, reference, advantages[rows], part.completion_mask).sum()
            value.backward()
            for name, own in leaves.items():
                modules[name][rows] = flat_gradient(own)
        if old_log_probs is None:
            old_all[rows, :reach] = log_probs.detach()
        mask = part.completion_mask
        count += int(mask.sum())
        ratio_sum += float(torch.exp(log_probs.detach() - old)[mask].sum())
        if loss.kl_weight:
            gap = (reference - log_probs.detach())[mask]
            kl_sum += float((torch.exp(gap) - gap - 1).sum())
        total += float(value.detach())
    return GradientResult(RolloutGrads(modules), total, old_all,
                          kl_sum / max(count, 1) if loss.kl_weight else float("nan"), ratio_sum / max(count, 1))
