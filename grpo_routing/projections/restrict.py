"""Restrict: only the trusted part of the gradient trains (TDGA, routing.md §3.2, §4.3); the rest is dropped.

    G' = U diag(alpha) U^T G        on the output side of every module (lora: its B; A keeps its gradient)

    where: gradient    then the optimizer, as in the paper. AdamW normalises each number by itself and leaves the subspace
    where: step        the applied step of B is projected instead: col(dB) stays in span(U) (P20)

Controls that tell the direction from the length, over the projected part of all modules together:

    direction: restricted, length: restricted   TDGA
    direction: restricted, length: whole        norm-matched: G' |G| / |G'|
    direction: whole,      length: restricted   vanilla's direction at TDGA's length: what a smaller rate alone does
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.projections.projection import Projection
from grpo_routing.projections.subspace import Update, Vector
from grpo_routing.types import Trusted


@dataclass(frozen=True)
class Restrict(Projection):
    where: str
    direction: str
    length: str
    takes = ("trusted",)

    def __post_init__(self) -> None:
        for name, legal in {"where": ("gradient", "step"), "direction": ("restricted", "whole"), "length": ("restricted", "whole")}.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"projection.{name} must be {' or '.join(legal)}; got {getattr(self, name)!r}")

    def gradient(self, update: Update, basis: Trusted) -> Update:
        return {DEPLOYED: self._kept(update[DEPLOYED], basis)} if self.where == "gradient" else update

    def step(self, applied: Update, basis: Trusted) -> Update:
        return {DEPLOYED: self._kept(applied[DEPLOYED], basis)} if self.where == "step" else applied

    def _kept(self, vector: Vector, trusted: Trusted) -> Vector:
        parts = {name: output_side(flat, trusted, name) for name, flat in vector.items()}
        inside = {name: inside_of(trusted, name, g) for name, g in parts.items()}
        whole, rest = (torch.sqrt(sum(g.square().sum() for g in some.values())) for some in (parts, inside))
        chosen = inside if self.direction == "restricted" else parts
        have, want = (rest if self.direction == "restricted" else whole), (rest if self.length == "restricted" else whole)
        factor = want / have if float(have) > 0 and self.direction != self.length else 1.0
        return {name: torch.cat([flat[: flat.numel() - chosen[name].numel()], (factor * chosen[name]).flatten()])
                for name, flat in vector.items()}


def output_side(flat: Tensor, trusted: Trusted, name: str) -> Tensor:
    """The B of a module's flat vector [A | B], [d_out, rank]."""
    d_out = len(trusted.modules[name])
    return flat[flat.numel() - d_out * trusted.rank :].view(d_out, trusted.rank)


def inside_of(trusted: Trusted, name: str, g: Tensor) -> Tensor:
    """U diag(alpha) U^T g, [d_out, rank]."""
    u, alpha = trusted.modules[name].to(g), trusted.weights[name].to(g)
    return u @ (alpha[:, None] * (u.T @ g))


def trusted_share(vector: Vector, trusted: Trusted) -> float:
    """|U^T G| / |G| over the output sides of all modules: how much of the gradient the clean update would have made."""
    parts = {name: output_side(flat, trusted, name) for name, flat in vector.items()}
    inside = sum(float((trusted.modules[name].to(g).T @ g).square().sum()) for name, g in parts.items())
    return (inside / max(sum(float(g.square().sum()) for g in parts.values()), 1e-30)) ** 0.5
