"""LoRA (Hu et al. 2021, arXiv:2106.09685): y += scale * B A x, A random, B zero.

With `quarantine_rank` the quarantine is a second LoRA with its own A and B, hence its own input directions: what tells the
blocks apart is not only the mask (routing.md §2.7c, graft.md §1.1).

    gate: true    the quarantine is scaled, token by token, by sigmoid(G x): Cloud et al.'s input-conditioned gate
                  (routing.md §1.2c). G reads its input and sends no gradient into it; ablation is the gate forced to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, AdaptedLinear, Adapter, Parameters, generator_for, trainable, wrap
from grpo_routing.adapters.per_rollout import rollout_linear


@dataclass(frozen=True)
class Lora:
    """rank r of the deployed update, `quarantine_rank` of the other one (0: no quarantine), and the scale of their branches.
    A is drawn from `seed`, the module's name and the block."""

    rank: int
    quarantine_rank: int
    scale: float
    gate: bool
    seed: int
    shared_axes = False
    has_coordinates = True

    def __post_init__(self) -> None:
        if self.gate and not self.quarantine_rank:
            raise ValueError("adapter.gate scales the quarantine, and adapter.quarantine_rank is 0; give it a rank")
        if self.rank < 1 or self.quarantine_rank < 0:
            raise ValueError(f"adapter.rank must be at least 1 and adapter.quarantine_rank at least 0; "
                             f"got {self.rank} and {self.quarantine_rank}")

    @property
    def blocks(self) -> tuple[str, ...]:
        return (DEPLOYED, QUARANTINE) if self.quarantine_rank else (DEPLOYED,)

    @property
    def sizes(self) -> dict[str, int]:
        """What the blocks' numbers are proportional to, before there is a model. A gate is less than one rank more."""
        return {DEPLOYED: self.rank, QUARANTINE: self.quarantine_rank + self.gate}

    @property
    def alike(self) -> str:
        """The setting that gives both blocks one size."""
        return f"adapter.quarantine_rank={self.rank}"

    def attach(self, model: nn.Module) -> Adapter:
        return wrap(model, self._make)

    def _make(self, name: str, base: nn.Linear) -> LoraLinear:
        ranks = {DEPLOYED: self.rank, QUARANTINE: self.quarantine_rank}
        return LoraLinear(base, {block: self._start(name, base, block, ranks[block]) for block in self.blocks}, self.scale)

    def _start(self, name: str, base: nn.Linear, block: str, rank: int) -> Parameters:
        d_out, d_in = base.weight.shape
        own = ("lora", self.seed, name) if block == DEPLOYED else ("lora", self.seed, name, block)
        a = (torch.rand(rank, d_in, generator=generator_for(*own)) * 2 - 1) / math.sqrt(d_in)
        start = {"A": a, "B": torch.zeros(d_out, rank)}
        start |= {"G": torch.zeros(1, d_in)} if self.gate and block == QUARANTINE else {}
        return {key: trainable(value, base.weight) for key, value in start.items()}


class LoraLinear(AdaptedLinear):
    def __init__(self, base: nn.Linear, blocks: dict[str, Parameters], scale: float) -> None:
        super().__init__(base, blocks)
        self.factor = scale

    def branch(self, x: Tensor, block: str) -> Tensor:
        own = self.live[block]
        # The factor goes on the narrow side, [b, T, r]: on the wide one it would cost as much as a product.
        out = rollout_linear(self.inner(block, self.factor * rollout_linear(x, own["A"])), own["B"])
        return out if "G" not in own else self._gate(block, x.detach(), own["G"]) * out

    def _gate(self, block: str, x: Tensor, weight: Tensor) -> Tensor:
        logits = rollout_linear(x, weight)  # [b, T, 1]
        if self.gates is not None:
            self.gates[block] = logits.squeeze(-1)
        return torch.sigmoid(logits)

    def coordinates(self, x: Tensor) -> Tensor:
        """The input in the deployed block's own coordinates, [b, T, r]; the adapter says `has_coordinates`."""
        return rollout_linear(x, self.blocks[DEPLOYED]["A"])

    def outputs_along(self, v: Tensor) -> Tensor:
        """The gradient of B is sum_t slope_t (A x_t)^T: its part along v is spanned by e_o x v, [d_out, D]."""
        a, b = self.blocks[DEPLOYED]["A"], self.blocks[DEPLOYED]["B"]
        rows = v.new_zeros(len(b), a.numel() + b.numel())
        for out in range(len(b)):
            rows[out, a.numel() + out * len(v) : a.numel() + (out + 1) * len(v)] = v
        return rows

    def foldable(self, block: str) -> bool:
        return "G" not in self.live[block]

    def delta(self, block: str) -> Tensor:
        return self.factor * (self.live[block]["B"] @ self.live[block]["A"])
