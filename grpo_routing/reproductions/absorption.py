"""Absorption of one feature in f = d + q, d deployed and q quarantined (SGTM, Shilov et al. 2025, arXiv:2512.05648, section 3;
the formula is derived, not in the paper).

A share p of the data is flagged and moves only q; the rest moves both. Loss (f - 1)^2 / 2, e = f - 1, mixed labels in every step:

    g_d = (1 - p) e + n_d        g_q = e + n_q        n: unrelated gradient noise of size s, independent for d and q
    SGD, s = 0                             d = (1 - p) / ((1 - p) + kappa)          kappa = lr_q / lr_d
    Adam, s = 0                            d = 1 / (1 + kappa) for every p < 1: it rescales the thinned gradient to unit size
    Adam, d's second moment from e + n_d   the SGD value again

Filtering would leave d = 1 for every p < 1, so a quarantine without any label already halves what is left in d.
Departures: noise rows are means over 64 pairs of seeds with opposite noise; the learning rate is ours (the spec sheet gives none).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARES = (0.0, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Optimizer:
    """How a gradient becomes a step. `second_moment` is none (SGD), masked (plain Adam) or unmasked (of d, before the mask)."""

    second_moment: str
    kappa: float = 1.0  # learning rate of q over that of d
    beta2: float = 0.95
    beta1: float = 0.9
    lr: float = 0.005
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.second_moment not in ("none", "masked", "unmasked"):
            raise ValueError(f"second_moment must be none, masked or unmasked; got {self.second_moment!r}")


SGD, ADAM, UNMASKED = Optimizer("none"), Optimizer("masked"), Optimizer("unmasked")
NOISY = Optimizer("masked", beta2=0.999)
ROWS = [  # name, optimizer, size of the noise, the spec sheet's numbers
    ("SGD", SGD, 0.0, (0.500, 0.333, 0.091, 0.010)),
    ("Adam", ADAM, 0.0, (0.500, 0.500, 0.500, 0.500)),
    ("Adam, kappa 10", Optimizer("masked", kappa=10.0), 0.0, (0.091, 0.091, 0.091, 0.091)),
    ("Adam, noise .1", NOISY, 0.1, (0.52, 0.52, 0.39, 0.09)),
    ("Adam, noise 1", NOISY, 1.0, (0.53, 0.40, 0.14, 0.04)),
    ("Adam, noise 5", NOISY, 5.0, (0.52, 0.35, 0.11, 0.04)),
    ("Adam, unmasked second moment", UNMASKED, 0.0, (0.500, 0.333, 0.091, 0.010)),
]


def main() -> None:
    print("share of the feature left in d, by labelled share p      ours (spec sheet)")
    print(f"{'':<30}" + "".join(f"{f'p={share:g}':>16}" for share in SHARES))
    print(f"{'formula, kappa 1':<30}" + "".join(f"{formula(share, 1.0):>8.3f}{'':8}" for share in SHARES))
    for name, optimizer, noise, expected in ROWS:
        left = train(torch.tensor(SHARES, dtype=torch.float64), optimizer, noise)
        print(f"{name:<30}" + "".join(f"{ours:>8.3f} ({theirs:.3f})" for ours, theirs in zip(left.tolist(), expected)), flush=True)


def formula(labelled: float, kappa: float) -> float:
    """What SGD leaves in d."""
    return (1 - labelled) / (1 - labelled + kappa)


def train(labelled: Tensor, optimizer: Optimizer, noise: float = 0.0, steps: int = 6000, seeds: int = 128) -> Tensor:
    """d after `steps` steps from d = q = 0, mean over seeds; one run for each labelled share. [P] -> [P]"""
    generator = torch.Generator().manual_seed(0)
    runs = seeds if noise else 1
    mask = torch.stack([1 - labelled, torch.ones_like(labelled)])[:, None]  # [2, 1, P]: what the labels leave of e for d and q
    rate = optimizer.lr * torch.tensor([1.0, optimizer.kappa], dtype=torch.float64)[:, None, None]
    weights, first, second = (torch.zeros(2, runs, len(labelled), dtype=torch.float64) for _ in range(3))
    for step in range(1, steps + 1):
        error = weights.sum(0) - 1
        other = 0.0
        if noise:
            drawn = noise * torch.randn(2, runs // 2, 1, generator=generator, dtype=torch.float64)
            other = torch.cat([drawn, -drawn], dim=1)  # opposite signs: most of the random walk cancels in the mean
        gradient = mask * error + other
        if optimizer.second_moment == "none":
            weights -= rate * gradient
            continue
        measured = gradient if optimizer.second_moment == "masked" else error + other
        first = optimizer.beta1 * first + (1 - optimizer.beta1) * gradient
        second = optimizer.beta2 * second + (1 - optimizer.beta2) * measured**2
        size = (second / (1 - optimizer.beta2**step)).sqrt() + optimizer.eps
        weights -= rate * first / (1 - optimizer.beta1**step) / size
    return weights[0].mean(0)


if __name__ == "__main__":
    main()
