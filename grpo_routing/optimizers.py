"""AdamW with a schedule. It returns the step that it applied, so that a projection can act on the step itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.projections.subspace import Update


@dataclass(frozen=True)
class AdamW:
    """Peak rate `lr`, linear warm-up over `warmup_steps`, then constant or cosine to zero; `clip` bounds each block's
    gradient norm (0: no clipping). Blocks are clipped apart: a large quarantine gradient must not shrink the deployed
    block's (routing.md P10)."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    clip: float
    warmup_steps: int
    schedule: str  # constant or cosine

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule must be constant or cosine; got {self.schedule!r}")

    def rate(self, step: int, steps: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        done = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * done))

    def start(self, adapter: Adapter) -> Optimizer:
        return Optimizer(self, adapter)


class Optimizer:
    """One torch AdamW over all blocks; a block or module without gradient does not move (grad None, not zero)."""

    def __init__(self, settings: AdamW, adapter: Adapter) -> None:
        self.settings, self.adapter = settings, adapter
        self.names = {f"{block}/{name}/{key}": p for block in adapter.blocks
                      for name, module in adapter.parameters(block).items() for key, p in module.items()}
        self.torch = torch.optim.AdamW(self.names.values(), lr=settings.lr, betas=(settings.beta1, settings.beta2),
                                       weight_decay=settings.weight_decay)

    def step(self, update: Update, lr: float) -> tuple[Update, float]:
        """Apply `update` (block -> flat gradients). Returns the applied step theta_before - theta_after of the same
        blocks, and the gradient norm of the deployed block before clipping."""
        for block in self.adapter.blocks:
            self.adapter.set_gradient(update.get(block, {}), block)
        norms = [self._clip(block) for block in update]
        before = {block: self.adapter.flatten(block) for block in update}
        for group in self.torch.param_groups:
            group["lr"] = lr
        self.torch.step()
        applied = {block: {name: old - new for (name, old), new in zip(flat.items(), self.adapter.flatten(block).values())}
                   for block, flat in before.items()}
        return applied, norms[0]

    def _clip(self, block: str) -> float:
        own = [p for name, p in self.names.items() if name.startswith(f"{block}/") and p.grad is not None]
        limit = self.settings.clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_(own, limit))

    def state(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": value for name, p in self.names.items() for key, value in self.torch.state[p].items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for full, value in state.items():
            name, _, key = full.rpartition("/")
            self.torch.state[self.names[name]][key] = value.clone()


OPTIMIZERS = {"adamw": AdamW}
