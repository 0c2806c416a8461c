"""One knob per singular direction: W = U diag(S) V^T, y += U diag(dS) V^T x (AntiPaSTO's basis, arXiv:2601.07473).

    axes: shared     both blocks turn the *same* axes: dS is deployed, dS_hack the quarantine that the seeds' `route` parks
                     the removed part in. Their gradients are bitwise equal, so nothing but the projection tells them
                     apart, and routing by rollout is refused (routing.md §0.6, P11).
    axes: disjoint   every `every`-th axis, from the strongest on, belongs to the quarantine and the others to the deployed block
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, AdaptedLinear, Adapter, trainable, wrap


@dataclass(frozen=True)
class Svd:
    """`rank` singular directions per linear (0: all of them); the decomposition is cached by a hash of W."""

    rank: int
    axes: str  # shared or disjoint
    every: int  # disjoint: each `every`-th axis is the quarantine's
    cache: str
    blocks = (DEPLOYED, QUARANTINE)
    has_coordinates = True

    def __post_init__(self) -> None:
        if self.axes not in ("shared", "disjoint"):
            raise ValueError(f"adapter.axes must be shared or disjoint; got {self.axes!r}")
        if self.every < 2:
            raise ValueError(f"adapter.every must be at least 2 (every second axis); got {self.every}")

    @property
    def shared_axes(self) -> bool:
        return self.axes == "shared"

    @property
    def sizes(self) -> dict[str, int]:
        """What the blocks' numbers are proportional to, before there is a model; a rank that `every` does not divide makes the
        quarantine smaller."""
        return {DEPLOYED: 1 if self.shared_axes else self.every - 1, QUARANTINE: 1}

    @property
    def alike(self) -> str:
        """The setting that gives both blocks one size."""
        return "adapter.every=2"

    def attach(self, model: nn.Module) -> Adapter:
        return wrap(model, self._make)

    def _make(self, name: str, base: nn.Linear) -> SvdLinear:
        u, vh = decompose(base.weight.detach(), Path(self.cache))
        rank = self.rank or len(vh)
        if rank > len(vh):
            raise ValueError(f"adapter.rank is {rank} but {name} has {len(vh)} singular directions; use 0 for all")
        everything = torch.arange(rank)
        owned = everything % self.every == self.every - 1
        index = dict.fromkeys(self.blocks, everything) if self.shared_axes else {
            DEPLOYED: everything[~owned], QUARANTINE: everything[owned]}
        return SvdLinear(base, {block: (u[:, own], vh[own]) for block, own in index.items()}, self.shared_axes)


class SvdLinear(AdaptedLinear):
    def __init__(self, base: nn.Linear, bases: dict[str, tuple[Tensor, Tensor]], shared: bool) -> None:
        super().__init__(base, {block: {"dS": trainable(torch.zeros(len(vh)), base.weight)} for block, (_, vh) in bases.items()})
        self.shared = shared
        for block, (u, vh) in bases.items():
            self.register_buffer(f"u_{block}", u.to(base.weight), persistent=False)  # [d_out, r]
            self.register_buffer(f"vh_{block}", vh.to(base.weight), persistent=False)  # [r, d_in]

    def branches(self, x: Tensor, active: list[str]) -> Tensor:
        whole = self.shared and not self.passes and all(not isinstance(self.scale[b], Tensor) and self.scale[b] == 1.0 for b in active)
        return self._turn(x, active[0], [self.live[block]["dS"] for block in active]) if whole else super().branches(x, active)

    def branch(self, x: Tensor, block: str) -> Tensor:
        return self._turn(x, block, [self.live[block]["dS"]])

    def _turn(self, x: Tensor, block: str, knobs: list[Tensor]) -> Tensor:
        u, vh = getattr(self, f"u_{block}"), getattr(self, f"vh_{block}")
        knob = reduce(torch.add, knobs)  # [r] or [b, r]; on shared axes both blocks are one product
        # A knob is wide: in half precision its product is taken and summed over tokens in float32, as a kernel would at the same price.
        return self.inner(block, (x @ vh.T * knob.unsqueeze(-2)).to(x.dtype)) @ u.T

    def coordinates(self, x: Tensor) -> Tensor:
        """The input in the deployed block's own coordinates, [b, T, r]; the adapter says `has_coordinates`."""
        return x @ getattr(self, f"vh_{DEPLOYED}").T

    def outputs_along(self, v: Tensor) -> Tensor:
        """The gradient of a knob is a product with its V^T x: v itself, [r]."""
        return v

    def delta(self, block: str) -> Tensor:
        knob = self.live[block]["dS"]
        return (getattr(self, f"u_{block}") * knob) @ getattr(self, f"vh_{block}").to(knob.dtype)


def decompose(weight: Tensor, cache: Path) -> tuple[Tensor, Tensor]:
    """U [d_out, r] and V^T [r, d_in] of a weight, from `cache` when it has been decomposed before. Of a weight that is only a shape
    (footprint.py), their shapes."""
    if isinstance(weight, FakeTensor):
        rank = min(weight.shape)
        return weight.new_empty(len(weight), rank), weight.new_empty(rank, weight.shape[1])
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
