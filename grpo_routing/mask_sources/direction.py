"""From pairs to an orthonormal, hack-oriented basis per module: what sources that read pairs share.

    D = g(hack) - g(clean)            one row per pair; g = gradient of the completion's NLL in the trained coordinates
    D = U S V^T                       top-k right singular vectors span the hack-ward part
    sign of each axis                 majority vote of the pairs: most of them must lie on its positive side
    axis cut, noise floor             S_i / S_0 >= tau per module; S_i above a quantile of all modules' S

A rewarded hack has the loss gradient A * g(hack) with A > 0, so a positive coefficient on an axis is what descending
the GRPO gradient would turn into more hacking. Pairing cancels what a prompt does to the gradient.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, generator_for
from grpo_routing.adapters.per_rollout import flat_gradient
from grpo_routing.mask_sources.pairs import Pair
from grpo_routing.policy import Policy
from grpo_routing.types import Basis, Packed, RolloutGrads, RolloutSums, Trusted

log = logging.getLogger("grpo_routing")


def completion_gradients(policy: Policy, texts: list[tuple[str, str]], micro_batch: int) -> dict[str, Tensor]:
    """Gradient of the mean completion NLL for (prompt, completion) texts: name -> [N, D], one backward a micro-batch."""
    tokens = policy.batch(texts)
    parts: dict[str, list[Tensor]] = {name: [] for name in policy.adapter.modules}
    for start in range(0, len(tokens), micro_batch):
        part = tokens.rows(list(range(start, min(start + micro_batch, len(tokens)))))
        with policy.adapter.per_rollout(len(part)) as leaves:
            log_probs = policy.log_probs(part)
            backward_rows(-(log_probs.sum(1) / part.completion_mask.sum(1)), leaves[DEPLOYED], parts)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def pair_differences(policy: Policy, pairs: list[Pair], first: str, second: str, micro_batch: int) -> dict[str, Tensor]:
    """g(first) - g(second) per pair and module: name -> [N, D]; first and second name fields of Pair.

    Both answers of a pair share a row and so the prompt's forward and backward (types.Packed), if the architecture allows.
    """
    if not policy.packs:
        one, other = (completion_gradients(policy, [(pair.prompt, getattr(pair, field)) for pair in pairs], micro_batch)
                      for field in (first, second))
        return {name: rows - other[name] for name, rows in one.items()}
    prompts = policy.encode_prompts([pair.prompt for pair in pairs])
    ones, others = (policy.encode_all([getattr(pair, field) for pair in pairs]) for field in (first, second))
    groups = [(prompt, [(*one, policy.end), (*other, policy.end)]) for prompt, one, other in zip(prompts, ones, others)]
    parts: dict[str, list[Tensor]] = {name: [] for name in policy.adapter.modules}
    for start in range(0, len(groups), micro_batch):
        packed = Packed.of(groups[start : start + micro_batch], policy.pad, policy.device)
        one, other = packed.segment == 1, packed.segment == 2
        with policy.adapter.per_rollout(len(packed.ids)) as leaves:
            means = one / one.sum(1, keepdim=True) - other / other.sum(1, keepdim=True)
            nll = -(policy.packed_log_probs(packed) * means).sum(1)
            backward_rows(nll, leaves[DEPLOYED], parts)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def backward_rows(losses: Tensor, leaves: dict[str, list[Tensor]], parts: dict[str, list[Tensor]]) -> None:
    """One backward of the sum; append each row's gradient, [b, D] per module. Raises FloatingPointError."""
    if not torch.isfinite(losses).all():
        raise FloatingPointError(f"non-finite NLL on pair completions {(~torch.isfinite(losses)).nonzero().flatten().tolist()}")
    losses.sum().backward()
    for name, own in leaves.items():
        parts[name].append(flat_gradient(own))


def fit_basis(differences: dict[str, Tensor], k: int, tau: float, floor: float) -> Basis:
    """The basis of differences [N, D] per module. Raises ValueError when no module has a direction left."""
    axes = {name: _module_axes(rows, k, tau) for name, rows in differences.items()}
    strengths = torch.cat([strength for _, strength in axes.values()])
    if not len(strengths):
        raise ValueError("the pairs give no direction in any module: hack and clean gradients coincide")
    least = torch.quantile(strengths, floor)
    kept = {}
    for name, (rows, strength) in axes.items():
        chosen = rows[strength >= least]
        if len(chosen):
            kept[name] = chosen
    return Basis(kept)


def _module_axes(differences: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    _, strength, axes = torch.linalg.svd(differences.double(), full_matrices=False)
    axes, strength = axes[:k], strength[:k]
    votes = ((differences.double() @ axes.T) > 0).sum(0) * 2 - len(differences)
    axes = axes * torch.where(votes < 0, -1.0, 1.0)[:, None]
    keep = (strength >= tau * strength[0]) & (strength > 1e-9)
    return axes[keep].to(differences.dtype), strength[keep]


def joined(bases: list[Basis]) -> Basis:
    """The span of several bases. Each axis keeps of its direction what the axes before it have not, and its orientation; one that has
    nothing of its own left is dropped."""
    stacks: dict[str, list[Tensor]] = {}
    for basis in bases:
        for name, rows in basis.modules.items():
            stacks.setdefault(name, []).append(rows)
    found = {}
    for name, parts in stacks.items():
        rows = torch.cat(parts)
        axes, shares = torch.linalg.qr(rows.double().T)
        own = shares.diagonal()
        found[name] = (axes * torch.where(own < 0, -1.0, 1.0)).T[own.abs() > 1e-4].to(rows.dtype)
    return Basis(found)


def separation(differences: dict[str, Tensor], basis: Basis) -> float:
    """Mean over modules of the share of held-out pairs whose hack-ward sum over the axes is positive (chance 0.5)."""
    shares = [((differences[name] @ rows.T).sum(1) > 0).float().mean() for name, rows in basis.modules.items()]
    return float(torch.stack(shares).mean())


def overlap(basis: Basis, other: Basis) -> float:
    """Mean squared cosine of the principal angles between two bases, over the modules that both have; 1 is the same."""
    shared = [name for name in basis.modules if name in other.modules]
    if not shared:
        return 0.0
    values = [float((basis.modules[n] @ other.modules[n].T).square().sum() / min(len(basis.modules[n]), len(other.modules[n])))
              for n in shared]
    return sum(values) / len(values)


def alignment(grads: RolloutGrads | RolloutSums, basis: Basis, cosine: bool = True) -> Tensor:
    """Cosine (or dot product) of each rollout's gradient with the hack direction, the sum of all axes of all modules, [B].

    A rollout without gradient has no score: nan.
    """
    axes = direction(basis)
    length = torch.stack([axis.square().sum() for axis in axes.values()]).sum().sqrt()
    along, norms = grads.along(axes), grads.norms()
    return torch.where(norms > 0, along / (norms * length if cosine else length).clamp_min(1e-30), torch.nan)


def direction(basis: Basis) -> dict[str, Tensor]:
    """The hack direction: the sum of a module's axes, name -> [D]."""
    return {name: rows.sum(0) for name, rows in basis.modules.items()}


def random_frames(basis: Basis, seed: int) -> Basis:
    """Each module's axes replaced by a random orthonormal frame of the same shape, uniform (Haar) over all of them."""
    frames = {}
    for name, rows in basis.modules.items():
        draw = torch.randn(rows.shape[1], rows.shape[0], generator=generator_for("random", seed, name), dtype=torch.float64)
        frames[name] = torch.linalg.qr(draw).Q.T.to(rows)
    return Basis(frames)


@dataclass(frozen=True)
class Fit:
    """A basis and what is worth knowing about it."""

    basis: Basis | Trusted
    facts: dict[str, float]


class StaleBasisError(RuntimeError):
    """A refitted basis shares less with the one before it than the config allows."""


def check_overlap(shared: float, floor: float, when_stale: str, step: int) -> None:
    """Warn about a refit that shares less than `floor` with the basis before it, or stop the run. Raises StaleBasisError."""
    if shared >= floor:
        return
    said = (f"step {step}: the refitted basis shares {shared:.2f} with the one before it (1 is the same, the floor is {floor:g}); "
            f"between refits it was mostly stale. Lower mask_source.refresh_every")
    if when_stale == "stop":
        raise StaleBasisError(f"{said}, or set mask_source.when_stale=warn")
    log.warning(said)


