"""What every optimizer shares: the settings with the learning-rate schedule, and the step as the training step sees it.

Blocks are optimized apart. Each is clipped by its own gradient norm, because a joint clip would let a large quarantine
gradient shrink the deployed block's (routing.md P10). A block that is absent from the update stands still as a whole:
parameters, moments, step counter and weight decay, since a gradient of zero would still coast on momentum (P9, T23).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grpo_routing.adapters.adapter import QUARANTINE, Adapter
from grpo_routing.projections.subspace import Update


@dataclass(frozen=True)
class Settings(ABC):
    """Peak rate `lr`, linear warm-up over `warmup_steps`, then constant or cosine to zero; `clip` bounds each block's
    gradient norm (0: no clipping); `quarantine_rate` multiplies the quarantine's rate (kappa of routing.md §2.7)."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    clip: float
    warmup_steps: int
    schedule: str  # constant or cosine
    quarantine_rate: float

    needs_natural: ClassVar[bool]  # whether `step` wants the unmasked gradients too

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule must be constant or cosine; got {self.schedule!r}")
        if not self.quarantine_rate > 0:
            raise ValueError(f"optimizer.quarantine_rate must be positive (1 treats the blocks alike); got {self.quarantine_rate}")

    def rate(self, step: int, steps: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        done = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * done))

    @abstractmethod
    def start(self, adapter: Adapter) -> Optimizer:
        """An optimizer of this adapter's blocks, its moments at zero."""


class Optimizer(ABC):
    """The parameters' step and its state. `facts` holds numbers about the last step, for the log."""

    def __init__(self, settings: Settings, adapter: Adapter) -> None:
        if settings.quarantine_rate != 1.0 and QUARANTINE not in adapter.blocks:
            raise ValueError(f"optimizer.quarantine_rate is {settings.quarantine_rate}, but the adapter has only the block "
                             f"{', '.join(adapter.blocks)}. Set it to 1.0, or choose an adapter with a quarantine.")
        self.settings, self.adapter, self.facts = settings, adapter, {}

    def step(self, update: Update, lr: float, natural: Update | None = None,
             participation: dict[str, float] | None = None) -> tuple[Update, dict[str, float]]:
        """Apply `update` (block -> module -> routed gradient [D]) at the rate `lr`.

        `natural` holds the same sums without masks, `participation` each block's share in (0, 1] of the step's rollouts;
        AdamW reads neither. Returns the applied step theta_before - theta_after, so that a projection can act on the step
        itself, and the gradient norm before clipping, both of the blocks in `update`. Raises ValueError for a block or
        module that the adapter lacks.
        """
        for block, gradients in update.items():
            if block not in self.adapter.blocks:
                raise ValueError(f"the adapter has the blocks {', '.join(self.adapter.blocks)}; the update has {block!r}. "
                                 "Choose an adapter with that block, or a projection that does not fill it.")
            if unknown := sorted(gradients.keys() - self.adapter.parameters(block).keys()):
                raise ValueError(f"the update of block {block!r} has modules that the adapter lacks: {', '.join(unknown[:3])}. "
                                 "Make gradients and optimizer from the same adapter.")
        before = {block: self.adapter.flatten(block) for block in update}
        norms = self._move(update, {block: self._rate(block, lr) for block in self.adapter.blocks}, natural, participation)
        applied = {block: {name: old - new for (name, old), new in zip(flat.items(), self.adapter.flatten(block).values())}
                   for block, flat in before.items()}
        return applied, norms

    def _rate(self, block: str, lr: float) -> float:
        return lr * self.settings.quarantine_rate if block == QUARANTINE else lr

    @abstractmethod
    def _move(self, update: Update, rates: dict[str, float], natural: Update | None,
              participation: dict[str, float] | None) -> dict[str, float]:
        """Change the parameters and the moments of the blocks in `update`; returns the norms before clipping."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, apart from the parameters."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`: further steps are the same bit for bit."""


def check_places(state: dict[str, Tensor], places: set[str]) -> None:
    """The keys of a state are place/key; raises ValueError when the adapter has no such place."""
    if unknown := sorted({full.rpartition("/")[0] for full in state} - places):
        raise ValueError(f"optimizer state does not fit: the adapter has {len(places)} places such as {min(places)}, "
                         f"the state also has {', '.join(unknown[:3])}. Resume with the adapter and optimizer that wrote it.")
