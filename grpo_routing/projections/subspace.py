"""Split a gradient into its hack-ward part and the rest, module by module (the seeds' projection).

    c = V g                            coefficient on each axis of the hack basis; c_i > 0: descending g moves hack-ward
    one_sided   use relu(c)            take only what moves hack-ward
    no_gate     use c                  take the whole component, whatever its sign
    reverse     use 2 c                flip the component: V g' = -V g
    removed = overshoot * use V        kept = g - removed, rescaled to |g| with preserve_magnitude

The relu comes before any aggregation: summing signed coefficients first would let anti-hack axes hide hack-ward ones.
cout = 0 under one_sided is an arithmetic identity and no result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.types import Basis

Vector = dict[str, Tensor]  # module name -> [D], a gradient or a step in the coordinates of one block
Update = dict[str, Vector]  # block -> vector
GATES = {"one_sided": torch.relu, "no_gate": lambda c: c, "reverse": lambda c: 2 * c}


@dataclass(frozen=True)
class Split:
    """kept + removed = g for every module, unless preserve_magnitude rescaled kept."""

    kept: Vector  # name -> [D]
    removed: Vector  # name -> [D], only modules of the basis


def check_settings(where: str, gate: str, overshoot: float) -> None:
    if where not in ("gradient", "step"):
        raise ValueError(f"projection.where must be gradient or step; got {where!r}")
    if gate not in GATES:
        raise ValueError(f"projection.gate must be one of {', '.join(GATES)}; got {gate!r}")
    if overshoot <= 0:
        raise ValueError(f"projection.overshoot must be positive (1 removes the part exactly); got {overshoot}")


def split(gradient: Vector, basis: Basis, gate: str, overshoot: float, preserve_magnitude: bool) -> Split:
    """Split per-module vectors [D]; modules without basis are kept whole."""
    kept, removed = dict(gradient), {}
    for name, rows in basis.modules.items():
        g = gradient[name]
        coefficient = rows @ g
        removed[name] = overshoot * (GATES[gate](coefficient) @ rows)
        rest = g - removed[name]
        if preserve_magnitude and float(rest.norm()) > 0:
            rest = rest * (g.norm() / rest.norm())
        kept[name] = rest
    return Split(kept, removed)


def hackward_share(gradient: Vector, basis: Basis) -> float:
    """Mean over the basis' modules of |relu(V g)| / |g|; 0 for a zero gradient."""
    shares = [float(torch.relu(rows @ gradient[name]).norm() / gradient[name].norm().clamp_min(1e-12))
              for name, rows in basis.modules.items()]
    return sum(shares) / len(shares)


def chance_share(basis: Basis) -> float:
    """What |V g| / |g| is about for a g that knows nothing of V: sqrt(k / D), mean over modules."""
    shares = [(len(rows) / rows.shape[1]) ** 0.5 for rows in basis.modules.values()]
    return sum(shares) / len(shares)


def fired_share(gradient: Vector, basis: Basis) -> float:
    """Share of the basis' modules in which some axis has a hack-ward component."""
    return sum(bool((rows @ gradient[name] > 1e-9).any()) for name, rows in basis.modules.items()) / len(basis.modules)
