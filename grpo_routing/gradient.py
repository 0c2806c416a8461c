"""One exact gradient per rollout and block, all from one backward (architecture.md §5).

    loss of rollout i:  -(1/Z) sum_t [ min(rho_t A_i, clip(rho_t) A_i) - beta K3_t ]      Z = prompts * group * max_new_tokens

Z is a constant (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783): it depends neither on lengths nor on masks nor on extra
rollouts, so neither the micro-batch size nor which rollouts share one (those of like length, so that little is padding) can change
a result. Rollouts do not interact, so with beta = 0 and ratio 1 the
gradient of rollout i is A_i times that of advantage 1 (graft.md §6.1.10): everything that is decided about a rollout may be
decided after the backward.

What was decided before it needs sums only: with `asked` no rollout's gradient outlives its micro-batch, so that memory grows with the
micro-batch and not with the batch, and rollouts of a prompt that are weighted alike share the prompt's forward and backward
(types.Packed). Decisions that read gradients keep all of them, [B, D] a block.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.adapters.per_rollout import flat_gradient
from grpo_routing.parallel import World
from grpo_routing.policy import Policy
from grpo_routing.types import Asked, Packed, RolloutGrads, RolloutSums, TokenBatch, weighted


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
    grads: dict[str, RolloutGrads | RolloutSums]  # per block; sums where only they were asked for
    losses: Tensor  # [B], detached
    old_log_probs: Tensor  # [B, T-1], detached; the reference point of further inner steps
    kl: float  # mean K3 over completion tokens, nan when beta is 0
    ratio: float  # mean importance ratio over completion tokens; 1 at the first inner step

    @property
    def loss(self) -> float:
        return float(self.losses.sum())

    def scaled(self, advantages: Tensor, asked: dict[str, Asked]) -> GradientResult:
        """What is asked of this result of advantage 1 as that of `advantages` [B] (beta = 0, ratio 1)."""
        grads = {block: rows.answer(asked[block], advantages) for block, rows in self.grads.items()}
        return replace(self, grads=grads, losses=self.losses * advantages)


def rollout_gradients(policy: Policy, tokens: TokenBatch, advantages: Tensor, loss: PolicyLoss, micro_batch: int,
                      old_log_probs: Tensor | None = None, blocks: tuple[str, ...] = (DEPLOYED,),
                      forward: Forward = Forward(), asked: dict[str, Asked] | None = None) -> GradientResult:
    """The gradient of every rollout in these blocks or, with `asked` (per block), only the sums asked of them.

    `advantages` is [B]. Rows whose advantage is zero have a zero gradient when beta is 0 and are not computed.
    `old_log_probs` [B, T-1] defaults to the current policy (ratio exactly 1).
    """
    adapter, world = policy.adapter, policy.world
    old_all = torch.zeros_like(tokens.completion_mask, dtype=advantages.dtype) if old_log_probs is None else old_log_probs
    sizes = {block: {name: flat.numel() for name, flat in adapter.flatten(block).items()} for block in blocks}
    active = list(range(len(tokens))) if loss.kl_weight or forward.aid else advantages.nonzero().flatten().tolist()
    active = world.share(active)
    kept = {block: (Summing(asked[block], sizes[block], advantages, world) if asked else Keeping(sizes[block], advantages, world, active))
            for block in blocks}
    losses, kl_sum, ratio_sum, count = torch.zeros_like(advantages), 0.0, 0.0, 0
    together = alike(tokens, active, forward, asked) if asked and policy.packs and not forward.aid else []
    apart = sorted(set(active).difference(*together))
    batches = [(rows, rows, None) for rows in of_like_length(tokens, apart, micro_batch)]
    for groups in of_like_size(together, micro_batch):
        packed = Packed.of(tokens.groups(groups), policy.pad, policy.device)
        batches.append(([row for group in groups for row in group], [group[0] for group in groups], packed))
    for rows, heads, packed in batches:  # a row of the forward stands for one rollout, or for the packed ones of its head
        part = tokens.rows(rows)
        mask = part.completion_mask
        reach = mask.shape[1]
        with adapter.per_rollout(len(heads), blocks, **forward.rows(heads)) as leaves, adapter.watched() if forward.aid else nullcontext():
            log_probs = policy.log_probs(part, packed)
            old = log_probs.detach() if old_log_probs is None else old_log_probs[rows, :reach]
            reference = policy.reference_log_probs(part, packed) if loss.kl_weight else None
            value = loss(log_probs, old, reference, advantages[rows], mask)
            if forward.aid:
                value = value + forward.aid(part, rows)
            value.sum().backward()
            for block, own in leaves.items():
                for name, module in own.items():
                    kept[block].add(name, heads, flat_gradient(module))
        log_probs, losses[rows] = log_probs.detach(), value.detach().to(losses)
        if old_log_probs is None:
            old_all[rows, :reach] = log_probs.to(old_all)
        count += int(mask.sum())
        ratio_sum += float(torch.exp(log_probs - old)[mask].sum())
        if loss.kl_weight:
            gap = (reference - log_probs)[mask]
            kl_sum += float((torch.exp(gap) - gap - 1).sum())
    if old_log_probs is None:
        old_all = world.sum("log-probs", old_all)
    kl_sum, ratio_sum, count = (sum(parts) for parts in zip(*world.joined("losses", [(kl_sum, ratio_sum, count)])))
    return GradientResult({block: own.result() for block, own in kept.items()}, world.sum("losses", losses), old_all,
                          kl_sum / max(count, 1) if loss.kl_weight else float("nan"), ratio_sum / max(count, 1))


def of_like_length(tokens: TokenBatch, rows: list[int], size: int) -> list[list[int]]:
    """Micro-batches of at most `size` rows of like length, the longest first: what does not fit fails at once. Within one the rows keep
    their order, so that a batch which fits in one is the batch itself."""
    lengths = tokens.lengths().tolist()
    ordered = sorted(rows, key=lambda row: -lengths[row])
    return [sorted(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def alike(tokens: TokenBatch, rows: list[int], forward: Forward, asked: dict[str, Asked]) -> list[list[int]]:
    """The rollouts, two and more, that one row can stand for: of one prompt, in one forward, with the same weight in every sum, and none
    whose own gradient is asked for."""
    own = torch.zeros(len(tokens), dtype=torch.bool)
    for one in asked.values():
        if one.axes is not None:
            own |= torch.ones_like(own) if one.of is None else one.of.cpu()
    settings = [*(weights for one in asked.values() for weights in one.sums), *(forward.passes or {}).values()]
    settings += [] if forward.quarantine is None else [forward.quarantine]
    shared = torch.stack([values.to(torch.float64).cpu() for values in settings], 1).tolist()
    prompts, found = tokens.prompts(), defaultdict(list)
    for row in rows:
        if not own[row]:
            found[prompts[row], *shared[row]].append(row)
    return [group for group in found.values() if len(group) > 1]


def of_like_size(groups: list[list[int]], size: int) -> list[list[list[int]]]:
    """Micro-batches of groups with at most `size` rollouts in all; a group that is larger is cut. The largest come first."""
    pieces = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    batches: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if not batches or sum(map(len, batches[-1])) + len(piece) > size:
            batches.append([])
        batches[-1].append(piece)
    return batches


class Keeping:
    """Keeps every rollout's gradient of a block; rollouts that never come have none. Of several processes each keeps what it computes:
    `active`, its share of the rollouts."""

    def __init__(self, sizes: dict[str, int], like: Tensor, world: World, active: list[int]) -> None:
        self.world, self.own, count = world, None, len(like)
        self.places = torch.arange(count)  # row of the batch -> row that is kept
        if world.size > 1:
            self.own = torch.zeros_like(like, dtype=torch.bool)
            self.own[active] = True
            self.places, count = self.own.cpu().cumsum(0) - 1, len(active)
        self.modules = {name: like.new_zeros(count, size) for name, size in sizes.items()}

    def add(self, name: str, rows: list[int], flat: Tensor) -> None:
        self.modules[name][self.places[rows].tolist()] = flat.to(self.modules[name])

    def result(self) -> RolloutGrads:
        return RolloutGrads(self.modules, self.world, self.own)


class Summing:
    """Answers what is asked of the gradients of a block from their micro-batches, module by module."""

    def __init__(self, asked: Asked, sizes: dict[str, int], like: Tensor, world: World) -> None:
        self.asked, self.world = asked, world
        self.sums = [{name: like.new_zeros(size) for name, size in sizes.items()} for _ in asked.sums]
        self.squares, self.inner = torch.zeros_like(like), torch.zeros_like(like)
        self.of = None if asked.axes is None else torch.ones_like(like, dtype=torch.bool) if asked.of is None else asked.of.to(like.device)

    def add(self, name: str, rows: list[int], flat: Tensor) -> None:
        for weights, sums in zip(self.asked.sums, self.sums):
            sums[name] += weighted(flat, weights[rows])
        if self.of is not None:  # also where rows stand for several rollouts, of which none is among those
            self.squares[rows] += flat.square().sum(1)
            if name in self.asked.axes:
                self.inner[rows] += flat @ self.asked.axes[name]

    def result(self) -> RolloutSums:
        sums = [self.world.sums("gradients", own) for own in self.sums]
        if self.of is None:
            return RolloutSums(self.asked, sums, None, None)
        squares, inner = self.world.sum("norms", self.squares), self.world.sum("along", self.inner)
        norms, inner = (torch.where(self.of, values, torch.nan) for values in (squares.sqrt(), inner))
        return RolloutSums(self.asked, sums, norms, inner)
