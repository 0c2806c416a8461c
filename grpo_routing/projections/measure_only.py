"""Vanilla GRPO: the hack-ward part stays where it was and is only measured."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.projections.subspace import Update, Vector
from grpo_routing.types import Basis


@dataclass(frozen=True)
class MeasureOnly:
    takes = ("none", "subspace")  # kinds of mask source
    needs_quarantine = False

    def gradient(self, gradient: Vector, basis: Basis | None) -> Update:
        return {DEPLOYED: gradient}

    def step(self, applied: Update, basis: Basis | None) -> Update:
        return applied
