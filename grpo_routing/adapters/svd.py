"""One knob per singular direction: W = U diag(S) V^T, y += U diag(dS + dS_hack) V^T x (AntiPaSTO's basis, arXiv:2601.07473).

Both blocks turn the *same* axes: dS is deployed, dS_hack is the quarantine that `route` parks the removed part in.
Their gradients are bitwise equal, so nothing but the projection tells them apart; rollout-level routing needs distinct
axes and is refused on this adapter (routing.md §0.6, P11).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, AdaptedLinear, Adapter, Parameters, wrap


@dataclass(frozen=True)
class Svd:
    """`rank` singular directions per linear (0: all of them); the decomposition is cached by a hash of W."""

    rank: int
    cache: str
    blocks = (DEPLOYED, QUARANTINE)

    def attach(self, model: nn.Module) -> Adapter:
        return wrap(model, self._make)

    def _make(self, name: str, base: nn.Linear) -> SvdLinear:
        u, vh = decompose(base.weight.detach(), Path(self.cache))
        rank = self.rank or len(vh)
        if rank > len(vh):
            raise ValueError(f"adapter.rank is {rank} but {name} has {len(vh)} singular directions; use 0 for all")
        knobs = {block: {"dS": nn.Parameter(base.weight.new_zeros(rank))} for block in self.blocks}
        return SvdLinear(base, knobs, u[:, :rank], vh[:rank])


class SvdLinear(AdaptedLinear):
    def __init__(self, base: nn.Linear, blocks: dict[str, Parameters], u: Tensor, vh: Tensor) -> None:
        super().__init__(base, blocks)
        self.register_buffer("u", u.to(base.weight), persistent=False)  # [d_out, r]
        self.register_buffer("vh", vh.to(base.weight), persistent=False)  # [r, d_in]

    def branch(self, x: Tensor, parameters: list[Parameters]) -> Tensor:
        knob = reduce(torch.add, [p["dS"] for p in parameters])  # [r] or [b, r]
        return (x @ self.vh.T * knob.unsqueeze(-2)) @ self.u.T

    def delta(self, parameters: list[Parameters]) -> Tensor:
        return (self.u * reduce(torch.add, [p["dS"] for p in parameters])) @ self.vh


def decompose(weight: Tensor, cache: Path) -> tuple[Tensor, Tensor]:
    """U [d_out, r] and V^T [r, d_in] of a weight, from `cache` when it has been decomposed before."""
    stored = weight.float().contiguous().cpu()
    file = cache / f"{hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:24]}.safetensors"
    if not file.exists():
        u, _, vh = torch.linalg.svd(stored, full_matrices=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{torch.initial_seed()}.{id(weight)}.part")
        save_file({"u": u.contiguous(), "vh": vh.contiguous()}, part)
        part.rename(file)
    tensors = load_file(file)
    return tensors["u"], tensors["vh"]
