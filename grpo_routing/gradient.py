"""One exact gradient per rollout and block, all from one backward (architecture.md §5).

    loss of rollout i:  -(1/Z) sum_t [ min(rho_t A_i, clip(rho_t) A_i) - beta K3_t ]      Z = prompts * group * max_new_tokens

Z is a constant (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783): it depends neither on lengths nor on masks nor on extra
rollouts, so the micro-batch size cannot change a result. Rollouts do not interact, so with beta = 0 and ratio 1 the
gradient of rollout i is A_i times that of advantage 1 (graft.md §6.1.10): everything that is decided about a rollout may be
decided after the backward.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, flat_gradient
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
class Forward:
    """How each rollout of a batch runs through the adapter, beyond its tokens.

    `quarantine` [B] is the forward scale of the quarantine, `passes` block -> [B] the share of its gradient that a block's
    branch lets through (activation stop-gradient), both per rollout; None is 1 for all.
    `aid(part, rows)` is a further loss per rollout [b], read off the branches of this very forward.
    """

    quarantine: Tensor | None = None
    passes: dict[str, Tensor] | None = None
    stop_at: str = "output"
    aid: object | None = None

    def rows(self, chosen: list[int]) -> dict:
        """The settings of some rows, as `Adapter.per_rollout` takes them. Nothing but ones is nothing at all."""
        quarantine = None if self.quarantine is None or bool((self.quarantine[chosen] == 1).all()) else self.quarantine[chosen]
        passes = {block: share[chosen] for block, share in (self.passes or {}).items()}
        return {"quarantine": quarantine, "passes": passes, "stop_at": self.stop_at}


@dataclass(frozen=True)
class GradientResult:
    grads: dict[str, RolloutGrads]  # per block
    losses: Tensor  # [B], detached
    old_log_probs: Tensor  # [B, T-1], detached; the reference point of further inner steps
    kl: float  # mean K3 over completion tokens, nan when beta is 0
    ratio: float  # mean importance ratio over completion tokens; 1 at the first inner step

    @property
    def loss(self) -> float:
        return float(self.losses.sum())

    def scaled(self, advantages: Tensor) -> GradientResult:
        """This result of advantage 1, turned into that of `advantages` [B] (beta = 0, ratio 1)."""
        grads = {block: rows.scaled(advantages) for block, rows in self.grads.items()}
        return GradientResult(grads, self.losses * advantages, self.old_log_probs, self.kl, self.ratio)


def rollout_gradients(policy: Policy, tokens: TokenBatch, advantages: Tensor, loss: PolicyLoss, micro_batch: int,
                      old_log_probs: Tensor | None = None, blocks: tuple[str, ...] = (DEPLOYED,),
                      forward: Forward = Forward()) -> GradientResult:
    """Per-rollout gradients of these blocks.

    `advantages` is [B]. Rows whose advantage is zero have a zero gradient when beta is 0 and are not computed.
    `old_log_probs` [B, T-1] defaults to the current policy (ratio exactly 1).
    """
    adapter, world = policy.adapter, policy.world
    width = tokens.ids.shape[1] - 1
    old_all = advantages.new_zeros(len(tokens), width) if old_log_probs is None else old_log_probs
    grads = {block: {name: advantages.new_zeros(len(tokens), flat.numel()) for name, flat in adapter.flatten(block).items()}
             for block in blocks}
    active = [row for row in range(len(tokens)) if loss.kl_weight or forward.aid or float(advantages[row]) != 0.0]
    active = world.share(active)
    losses, kl_sum, ratio_sum, count = advantages.new_zeros(len(tokens)), 0.0, 0.0, 0
    for start in range(0, len(active), micro_batch):
        rows = active[start : start + micro_batch]
        part = tokens.rows(rows)
        reach = part.completion_mask.shape[1]
        with adapter.per_rollout(len(rows), blocks, **forward.rows(rows)) as leaves, adapter.watched() if forward.aid else nullcontext():
            log_probs = policy.log_probs(part)
            old = log_probs.detach() if old_log_probs is None else old_log_probs[rows, :reach]
            reference = policy.reference_log_probs(part) if loss.kl_weight else None
            value = loss(log_probs, old, reference, advantages[rows], part.completion_mask)
            if forward.aid:
                value = value + forward.aid(part, rows)
            value.sum().backward()
            for block, own in leaves.items():
                for name, module in own.items():
                    grads[block][name][rows] = flat_gradient(module)
        if old_log_probs is None:
            old_all[rows, :reach] = log_probs.detach()
        mask = part.completion_mask
        count += int(mask.sum())
        ratio_sum += float(torch.exp(log_probs.detach() - old)[mask].sum())
        if loss.kl_weight:
            gap = (reference - log_probs.detach())[mask]
            kl_sum += float((torch.exp(gap) - gap - 1).sum())
        losses[rows] = value.detach().to(losses)
    if old_log_probs is None:
        old_all = world.sum("log-probs", old_all)
    kl_sum, ratio_sum, count = (sum(parts) for parts in zip(*world.joined("losses", [(kl_sum, ratio_sum, count)])))
    return GradientResult({block: RolloutGrads(own, world) for block, own in grads.items()}, world.sum("losses", losses), old_all,
                          kl_sum / max(count, 1) if loss.kl_weight else float("nan"), ratio_sum / max(count, 1))
