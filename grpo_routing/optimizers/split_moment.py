"""Split-moment AdamW: the routed gradient says where to go, the unmasked one how far (GRAFT, graft.md §1.6).

    c      = min(1, clip / |routed|)                  one clip coefficient per block, for both streams
    m      <- beta1 m + (1 - beta1) c routed
    source = natural | routed, floor: max(|natural|, |routed|)
    v      <- beta2 v + (1 - beta2) (c q^-rho source)^2
    theta  <- (1 - lr wd) theta - lr m' / max(sqrt(v') + eps, |m'| / max_step)        m', v': without their start-up bias

Plain Adam divides by the size of the very stream that was masked, and so undoes the mask's attenuation (routing.md §0.11,
P23). Here what a mask removed stays removed, and what it kept is not rescaled. A masked rollout then affects a
block's step *size*, never its direction.

q is the share of the step's rollouts that train the block at all (anchors do not train the quarantine). The step shrinks
with it as q^rho when the sums are mostly signal and as q^(rho + 1/2) when they are mostly noise; so no rho is right for both.
Where unmasked contributions cancel, v is near zero and the step unbounded: the clamp bounds it and leaves the moments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.optimizers.optimizer import Optimizer, Settings, check_places
from grpo_routing.optimizers.streams import check_streams
from grpo_routing.projections.subspace import Update, Vector

EPSILON = 1e-8  # torch.optim.AdamW's
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True)
class SplitMoment(Settings):
    """`second_moment`: where v comes from; `participation`: rho; `max_step`: the largest step of a coordinate in units of
    the block's rate (0: none); `floor`: v from the larger of both gradients, for over-routing (lambda > 1)."""

    second_moment: str  # natural or routed
    participation: float
    max_step: float
    floor: bool

    needs_natural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second_moment not in ("natural", "routed"):
            raise ValueError(f"optimizer.second_moment must be natural or routed; got {self.second_moment!r}")
        if self.participation not in (0.0, 0.5, 1.0):
            raise ValueError(f"optimizer.participation must be 0, 0.5 or 1; got {self.participation}")
        if self.max_step < 0:
            raise ValueError(f"optimizer.max_step must be positive, or 0 for no clamp; got {self.max_step}")
        if self.floor and self.second_moment == "routed":
            raise ValueError("optimizer.floor takes the larger of both gradients, so second_moment=routed would mean nothing. "
                             "Set floor=false or second_moment=natural.")

    def start(self, adapter: Adapter) -> Optimizer:
        return SplitMomentAdamW(self, adapter)


@dataclass
class Moments:
    """The state of one module of one block."""

    first: Tensor  # [D]
    second: Tensor  # [D]
    step: Tensor  # [], counts only the steps that had a gradient here


class SplitMomentAdamW(Optimizer):
    """Works on flat gradients [D]; a module's moments appear with its first gradient."""

    def __init__(self, settings: SplitMoment, adapter: Adapter) -> None:
        super().__init__(settings, adapter)
        self.moments: dict[str, Moments] = {}  # block/module ->

    def _move(self, update: Update, rates: dict[str, float], natural: Update | None,
              participation: dict[str, float] | None) -> dict[str, float]:
        check_streams(update, natural, participation, self.settings.participation)
        self.facts, norms = {}, {}
        for block, routed in update.items():
            factor = participation[block] ** -self.settings.participation if self.settings.participation else 1.0
            norms[block] = float(torch.nn.utils.get_total_norm(list(routed.values())))
            self._move_block(block, routed, natural[block], self._clip(norms[block]), factor, rates[block])
        return norms

    def _move_block(self, block: str, routed: Vector, natural: Vector, clip: float, factor: float, rate: float) -> None:
        theta, clamped, coordinates = self.adapter.flatten(block), 0, 0
        for name, gradient in routed.items():
            moments = self._moments_of(f"{block}/{name}", gradient)
            self._remember(moments, clip * gradient, clip * factor * self._source(gradient, natural[name]))
            direction, hit = self._direction(moments)
            theta[name] = (1 - rate * self.settings.weight_decay) * theta[name] - rate * direction
            clamped, coordinates = clamped + hit.sum(), coordinates + hit.numel()
        self.adapter.load_flat(theta, block)
        self.facts[f"clamped_{block}"] = float(clamped) / max(1, coordinates)

    def _clip(self, norm: float) -> float:
        return min(1.0, self.settings.clip / (norm + CLIP_EPSILON)) if self.settings.clip else 1.0

    def _moments_of(self, place: str, like: Tensor) -> Moments:
        if place not in self.moments:
            self.moments[place] = Moments(torch.zeros_like(like), torch.zeros_like(like), torch.tensor(0))
        return self.moments[place]

    def _source(self, routed: Tensor, natural: Tensor) -> Tensor:
        if self.settings.floor:
            return torch.maximum(natural.abs(), routed.abs())
        return natural if self.settings.second_moment == "natural" else routed

    def _remember(self, moments: Moments, gradient: Tensor, source: Tensor) -> None:
        moments.step += 1
        moments.first.lerp_(gradient, 1 - self.settings.beta1)
        moments.second.mul_(self.settings.beta2).addcmul_(source, source, value=1 - self.settings.beta2)

    def _direction(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """The step in units of the rate, and which coordinates the clamp touched; both [D]."""
        s, t = self.settings, int(moments.step)
        mean = moments.first / (1 - s.beta1**t)
        scale = (moments.second / (1 - s.beta2**t)).sqrt() + EPSILON
        least = mean.abs() / s.max_step if s.max_step else torch.zeros_like(scale)
        return mean / torch.maximum(scale, least), least > scale

    def state(self) -> dict[str, Tensor]:
        return {f"{place}/{key}": value for place, moments in self.moments.items() for key, value in vars(moments).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        devices = {f"{block}/{name}": flat.device for block in self.adapter.blocks for name, flat in self.adapter.flatten(block).items()}
        check_places(state, set(devices))
        self.moments = {}
        for place in {full.rpartition("/")[0] for full in state}:
            first, second = (state[f"{place}/{key}"].to(devices[place], copy=True) for key in ("first", "second"))
            self.moments[place] = Moments(first, second, state[f"{place}/step"].clone())
