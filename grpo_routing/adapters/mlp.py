"""Small SwiGLU blocks beside each frozen MLP (graft.md §1.1): y += down_b(silu(gate_b x) * up_b x), down zero at the start.

Each block has its own width. Sampling and export fold them in exactly, by widening the frozen MLP: rows of gate and up,
columns of down. So a block owns whole neurons, and is gone when they are cut off (routing.md §1.2b, Ablate).
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_routing.adapters.adapter import (
    DEPLOYED,
    QUARANTINE,
    AdaptedModule,
    Adapter,
    Parameters,
    generator_for,
    is_expert,
    trainable,
    wrap,
)
from grpo_routing.adapters.per_rollout import rollout_linear

PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mlp:
    """`width` neurons per MLP for the deployed block, `quarantine_width` for the other (0: no quarantine)."""

    width: int
    quarantine_width: int
    seed: int
    shared_axes = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.quarantine_width < 0:
            raise ValueError(f"adapter.width must be at least 1 and adapter.quarantine_width at least 0; "
                             f"got {self.width} and {self.quarantine_width}")

    @property
    def blocks(self) -> tuple[str, ...]:
        return (DEPLOYED, QUARANTINE) if self.quarantine_width else (DEPLOYED,)

    @property
    def sizes(self) -> dict[str, int]:
        """What the blocks' numbers are proportional to, before there is a model."""
        return {DEPLOYED: self.width, QUARANTINE: self.quarantine_width}

    @property
    def alike(self) -> str:
        """The setting that gives both blocks one size."""
        return f"adapter.quarantine_width={self.width}"

    def attach(self, model: nn.Module) -> Adapter:
        return wrap(model, self._make, is_mlp, f"MLP with {', '.join(PARTS)}")

    def _make(self, name: str, base: nn.Module) -> AdaptedMlp:
        widths = {DEPLOYED: self.width, QUARANTINE: self.quarantine_width}
        return AdaptedMlp(base, {block: self._start(name, base, block, widths[block]) for block in self.blocks})

    def _start(self, name: str, base: nn.Module, block: str, width: int) -> Parameters:
        weight = base.down_proj.weight  # [d, d_mlp]
        bound = math.sqrt(6 / len(weight))  # Kaiming's, fan-in d
        gate, up = ((torch.rand(width, len(weight), generator=generator_for("mlp", self.seed, name, block, part)) * 2 - 1) * bound
                    for part in PARTS[:2])
        start = {"gate": gate, "up": up, "down": torch.zeros(len(weight), width)}
        return {key: trainable(value, weight) for key, value in start.items()}


def is_mlp(name: str, module: nn.Module) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Linear) for part in PARTS) and hasattr(module, "act_fn") and not is_expert(name)


class AdaptedMlp(AdaptedModule):
    def __init__(self, base: nn.Module, blocks: dict[str, Parameters]) -> None:
        super().__init__(blocks)
        if any(getattr(base, part).bias is not None for part in PARTS):
            raise ValueError("adapter=mlp widens MLPs without bias; this model's have one. Choose adapter=lora")
        self.frozen, self.original = base, None

    def base(self, x: Tensor) -> Tensor:
        return self.frozen(x)

    def branch(self, x: Tensor, block: str) -> Tensor:
        own = self.live[block]
        inner = self.frozen.act_fn(rollout_linear(x, own["gate"])) * rollout_linear(x, own["up"])
        return rollout_linear(self.inner(block, inner), own["down"])

    def fold(self, blocks: dict[str, float]) -> None:
        self.original = [getattr(self.frozen, part).weight.data for part in PARTS]
        if blocks:
            for part, weight, dim in zip(PARTS, self.original, (0, 0, 1)):
                name = part.removesuffix("_proj")
                own = [self.live[block][name] * (scale if name == "down" else 1.0) for block, scale in blocks.items()]
                getattr(self.frozen, part).weight.data = torch.cat([weight, *(rows.to(weight.dtype) for rows in own)], dim)

    def unfold(self) -> None:
        for part, weight in zip(PARTS, self.original):
            getattr(self.frozen, part).weight.data = weight
        self.original = None

    def plain(self) -> nn.Module:
        mlp = deepcopy(self.frozen)
        width = len(mlp.gate_proj.weight)
        mlp.intermediate_size = mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = width
        return mlp
