"""Vanilla GRPO: the hack-ward part stays where it was and is only measured."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.projections.projection import Projection


@dataclass(frozen=True)
class MeasureOnly(Projection):
    takes = ("none", "subspace", "rollout", "trusted")
