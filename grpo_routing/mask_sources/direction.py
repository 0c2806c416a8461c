"""From pairs to an orthonormal, hack-oriented basis per module: what every direction source shares.

    D = g(hack) - g(clean)            one row per pair; g = gradient of the completion's NLL in the trained coordinates
    D = U S V^T                       top-k right singular vectors span the hack-ward part
    sign of each axis                 majority vote of the pairs: most of them must lie on its positive side
    axis cut, noise floor             S_i / S_0 >= tau per module; S_i above a quantile of all modules' S

A rewarded hack has the loss gradient A * g(hack) with A > 0, so a positive coefficient on an axis is what descending
the GRPO gradient would turn into more hacking. Pairing cancels what a prompt does to the gradient.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, flat_gradient
from grpo_routing.mask_sources.pairs import Pair, fingerprint, load_pairs
from grpo_routing.mask_sources.view import Memory, StepView, unknown
from grpo_routing.policy import Policy
from grpo_routing.projections.subspace import chance_share
from grpo_routing.types import Basis, Labels, PackedPairs, RolloutGrads, TokenBatch


def completion_gradients(policy: Policy, texts: list[tuple[str, str]], micro_batch: int) -> dict[str, Tensor]:
    """Gradient of the mean completion NLL for (prompt, completion) texts: name -> [N, D], one backward a micro-batch."""
    prompts = policy.encode_prompts([prompt for prompt, _ in texts])
    completions = policy.encode_all([completion for _, completion in texts])
    sequences = [(prompt, (*completion, policy.end)) for prompt, completion in zip(prompts, completions)]
    tokens = TokenBatch.of(sequences, policy.pad, policy.device)
    parts: dict[str, list[Tensor]] = {name: [] for name in policy.adapter.modules}
    for start in range(0, len(tokens), micro_batch):
        part = tokens.rows(list(range(start, min(start + micro_batch, len(tokens)))))
        with policy.adapter.per_rollout(len(part)) as leaves:
            log_probs = policy.log_probs(part)
            backward_rows(-(log_probs.sum(1) / part.completion_mask.sum(1)), leaves[DEPLOYED], parts)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def pair_differences(policy: Policy, pairs: list[Pair], first: str, second: str, micro_batch: int) -> dict[str, Tensor]:
    """g(first) - g(second) per pair and module: name -> [N, D]; first and second name fields of Pair.

    Both answers of a pair share a row and so the prompt's forward and backward (types.PackedPairs).
    """
    prompts = policy.encode_prompts([pair.prompt for pair in pairs])
    ones, others = (policy.encode_all([getattr(pair, field) for pair in pairs]) for field in (first, second))
    triples = [(prompt, (*one, policy.end), (*other, policy.end)) for prompt, one, other in zip(prompts, ones, others)]
    parts: dict[str, list[Tensor]] = {name: [] for name in policy.adapter.modules}
    for start in range(0, len(triples), micro_batch):
        packed = PackedPairs.of(triples[start : start + micro_batch], policy.pad, policy.device)
        with policy.adapter.per_rollout(len(packed.ids)) as leaves:
            nll = -(policy.packed_log_probs(packed) * packed.weight).sum(1)
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


def alignment(grads: RolloutGrads, basis: Basis) -> Tensor:
    """Cosine of each rollout's gradient with the hack direction, the sum of all axes of all modules, [B].

    Advantage 1 for every rollout, so an unlucky group does not hide a hack. A rollout without gradient scores -1.
    """
    axes = {name: rows.sum(0) for name, rows in basis.modules.items()}
    along = torch.stack([grads.modules[name] @ axis for name, axis in axes.items()]).sum(0)
    length = torch.stack([axis.square().sum() for axis in axes.values()]).sum().sqrt()
    norms = grads.norms()
    return torch.where(norms > 0, along / (norms * length).clamp_min(1e-30), -torch.ones_like(norms))


def highest(scores: Tensor, share: float) -> Tensor:
    """True for the `share` of rollouts with the highest scores, rounded; ties go to the earlier rollout. [B] bool."""
    flags = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    flags[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = True
    return flags


@dataclass(frozen=True)
class Fit:
    """A basis and what is worth knowing about it."""

    basis: Basis
    facts: dict[str, float]


@dataclass(frozen=True)
class DirectionSource(ABC):
    """A subspace source fitted on pairs. A control is the same source with one stage replaced.

    `level` says what the direction is for: `gradient` hands on the basis (project the summed gradient), `rollout` scores each
    rollout's own gradient along it and flags the highest `flag_share` of every step (keep, absorb or route it whole).
    `refresh_every` n > 0 fits again before every n-th step, with the quarantine ablated. `cache` is a folder; a fit is
    stored under a hash of the model, the adapter's state, the pairs and these settings.
    """

    level: str
    flag_share: float

    pairs: str
    known: tuple[str, ...]
    k: int
    tau: float
    floor: float
    held_out: int
    refresh_every: int
    micro_batch: int
    seed: int
    cache: str
    kinds = ("subspace", "rollout")
    pilot_batches = 0
    uses_oracle = False

    def __post_init__(self) -> None:
        """Refuse unusable pairs when the config is read. Raises PairFileError or ValueError."""
        if self.level not in ("gradient", "rollout"):
            raise ValueError(f"mask_source.level must be gradient or rollout; got {self.level!r}")
        if not 0 < self.flag_share < 1:
            raise ValueError(f"mask_source.flag_share must lie between 0 and 1; got {self.flag_share}")
        pairs = load_pairs(self.pairs, self.known)
        if not 0 <= self.held_out <= len(pairs) - 2:
            raise ValueError(f"mask_source.held_out={self.held_out} of {len(pairs)} pairs for {list(self.known)} leaves fewer "
                             f"than 2 to fit; lower it or write more pairs")
        if self.k < 1 or not 0 <= self.tau <= 1 or not 0 <= self.floor < 1:
            raise ValueError(f"a direction needs k >= 1, tau in [0, 1] and floor in [0, 1); got {self.k}, {self.tau}, {self.floor}")

    @property
    def kind(self) -> str:
        return "subspace" if self.level == "gradient" else "rollout"

    @property
    def reads(self) -> tuple[str, ...]:
        pairs = ("pairs of known loopholes",)
        return pairs if self.level == "gradient" else (*pairs, "gradients")

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        """At level `rollout`: flag the highest scores. A subspace marks no rollout."""
        if self.level == "gradient":
            return unknown(view), memory
        scores = alignment(view.grads, view.basis)
        live = int((view.grads.norms() > 0).sum())  # the share is of rollouts that can train anything
        return Labels.of(highest(scores, self.flag_share * live / len(scores)).to(view.rewards)), memory

    def fit(self, policy: Policy) -> Fit:
        """The basis for the policy as it stands, from the cache when the same fit was made before."""
        pairs = load_pairs(self.pairs, self.known)
        file = Path(self.cache) / f"{self._key(policy, pairs)}.safetensors"
        if not file.exists():
            self._store(file, self._fit(policy, pairs))
        with safe_open(file, "pt", device=str(policy.device)) as stored:
            rows = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a safetensors handle is no dict
            return Fit(Basis(rows), json.loads(stored.metadata()["facts"]))

    def _fit(self, policy: Policy, pairs: list[Pair]) -> Fit:
        order = random.Random(f"pairs/{self.seed}").sample(range(len(pairs)), len(pairs))
        reserved = set(order[: self.held_out])
        with policy.adapter.only(DEPLOYED):
            differences = self.differences(policy, pairs)
        fit_rows = [row for row in range(len(pairs)) if row not in reserved]
        basis = self.finish(fit_basis({name: rows[fit_rows] for name, rows in differences.items()}, self.k, self.tau, self.floor))
        facts = {"pairs": float(len(fit_rows)), "modules": float(len(basis.modules)), "chance": chance_share(basis)}
        if reserved:
            rows = sorted(reserved)
            facts["separation_held_out"] = separation({name: d[rows] for name, d in differences.items()}, basis)
        return Fit(basis, facts)

    @abstractmethod
    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        """One row per pair and module, [N, D]."""

    def finish(self, basis: Basis) -> Basis:
        return basis

    def _key(self, policy: Policy, pairs: list[Pair]) -> str:
        unused = ("cache", "pairs", "refresh_every", "level", "flag_share")
        settings = {name: value for name, value in asdict(self).items() if name not in unused}
        # The number of threads changes the rounding, and a cached fit must be the one that this run would have made.
        state = (policy.fingerprint, policy.adapter.fingerprint(), torch.get_num_threads())
        parts = (type(self).__name__, state, fingerprint(pairs), settings)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

    @staticmethod
    def _store(file: Path, fit: Fit) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({name: rows.contiguous() for name, rows in fit.basis.modules.items()}, part, {"facts": json.dumps(fit.facts)})
        part.rename(file)
