"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), torch's own, with each block clipped and scaled apart.

Both moments come from the routed gradient. So a block whose gradient is cut to a steady share takes whole steps all
the same: Adam divides the share out again (routing.md §0.11). `split_moment` keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.optimizers.optimizer import Optimizer, Settings, check_places
from grpo_routing.projections.subspace import Update


@dataclass(frozen=True)
class AdamW(Settings):
    """Plain AdamW: no settings of its own."""

    needs_natural: ClassVar[bool] = False

    def start(self, adapter: Adapter) -> Optimizer:
        return TorchAdamW(self, adapter)


class TorchAdamW(Optimizer):
    """One torch AdamW with a parameter group per block; what has no gradient does not move (grad None, not zero)."""

    def __init__(self, settings: AdamW, adapter: Adapter) -> None:
        super().__init__(settings, adapter)
        self.names = {f"{block}/{name}/{key}": p for block in adapter.blocks
                      for name, module in adapter.parameters(block).items() for key, p in module.items()}
        groups = [{"params": [p for name, p in self.names.items() if name.startswith(f"{block}/")]} for block in adapter.blocks]
        self.torch = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2),
                                       weight_decay=settings.weight_decay)

    def _move(self, update: Update, rates: dict[str, float], natural: Update | None,
              participation: dict[str, float] | None) -> dict[str, float]:
        for block, group in zip(self.adapter.blocks, self.torch.param_groups):
            self.adapter.set_gradient(update.get(block, {}), block)
            group["lr"] = rates[block]
        norms = {block: self._clip(block) for block in update}
        self.torch.step()
        return norms

    def _clip(self, block: str) -> float:
        own = [p for name, p in self.names.items() if name.startswith(f"{block}/") and p.grad is not None]
        limit = self.settings.clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_(own, limit))

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": value for name, p in self.names.items() for key, value in self.torch.state[p].items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        check_places(state, set(self.names))
        self.torch.state.clear()
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            parameter = self.names[name]
            place = value.device if key == "step" else parameter.device  # torch keeps its counters on the CPU
            self.torch.state[parameter][key] = value.to(place, copy=True)
