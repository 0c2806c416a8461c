"""LoRA (Hu et al. 2021, arXiv:2106.09685): y += scale * B A x, A random, B zero, one deployed block."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from grpo_routing.adapters.adapter import DEPLOYED, AdaptedLinear, Adapter, Parameters, rollout_linear, wrap


@dataclass(frozen=True)
class Lora:
    """rank r of the update and the scale of its branch. A is drawn from `seed` and the module's name."""

    rank: int
    scale: float
    seed: int
    blocks = (DEPLOYED,)

    def attach(self, model: nn.Module) -> Adapter:
        return wrap(model, self._make)

    def _make(self, name: str, base: nn.Linear) -> LoraLinear:
        d_out, d_in = base.weight.shape
        digest = hashlib.sha256(f"lora/{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        a = (torch.rand(self.rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)
        blocks = {DEPLOYED: {"A": nn.Parameter(a.to(base.weight)), "B": nn.Parameter(base.weight.new_zeros(d_out, self.rank))}}
        return LoraLinear(base, blocks, self.scale)


class LoraLinear(AdaptedLinear):
    def __init__(self, base: nn.Linear, blocks: dict[str, Parameters], scale: float) -> None:
        super().__init__(base, blocks)
        self.scale = scale

    def branch(self, x: Tensor, parameters: list[Parameters]) -> Tensor:
        # The scale goes on the narrow side, [b, T, r]: on the wide one it would cost as much as a product.
        return reduce(torch.add, [rollout_linear(self.scale * rollout_linear(x, p["A"]), p["B"]) for p in parameters])

    def delta(self, parameters: list[Parameters]) -> Tensor:
        return reduce(torch.add, [self.scale * (p["B"] @ p["A"]) for p in parameters])
