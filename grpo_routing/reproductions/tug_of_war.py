"""Tug of war of two parameters that share a feature (SGTM, Shilov et al. 2025, arXiv:2512.05648; GR, Cloud et al. 2024,
arXiv:2410.04332, appendix A).

The output is S = d + q, d deployed and q quarantined. Unlabelled and retain data want 2, flagged data want 1:

    L = U (d + q - 2)^2  +  F (sg(d) + q - 1)^2  +  R (d - 2)^2          sg: stop-gradient; the R term runs without q

    R = 0   S -> (4U + F) / (2U + F), but d grows by lr * 2UF / (2U + F) a step and q falls by as much, for ever:
            S = 5/3 and a growth of (2/3) lr at U = F = 1
    R > 0   S* = (2U + F) / (U + F)   and   d* = 2 + UF / ((U + F) R): the retain share alone bounds the harm left in d

Departures: the closed forms are ours; the authors show the demonstration without them. Plain gradient descent from (0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pull:
    """Weights of the three losses."""

    unlabelled: float
    flagged: float
    retain: float


FIXED = {  # pull -> (d*, q*) of the spec sheet
    Pull(1, 1, 0.2): (4.5, -3.0),
    Pull(0.75, 1, 0.25): (3.7143, -2.2857),
    Pull(0, 1, 1): (2.0, -1.0),
}
DIVERGING, LR, DRIFTED = Pull(1, 1, 0), 0.01, {1000: 7.2222, 2000: 13.8889}  # steps -> d


def main() -> None:
    path = descend(DIVERGING, LR, max(DRIFTED))
    print("no retain data, lr .01                       ours      closed form   spec sheet")
    for steps, expected in DRIFTED.items():
        print(f"  d after {steps} steps                      {path[steps, 0]:9.4f}  {drift(DIVERGING, LR, steps):11.4f}  {expected:11.4f}")
    slope = float(path[-1, 0] - path[-2, 0])
    print(f"  growth of d per step / lr                 {slope / LR:9.4f}  {drift_rate(DIVERGING):11.4f}  {2 / 3:11.4f}")
    print(f"  S                                         {float(path[-1].sum()):9.4f}  {5 / 3:11.4f}  {5 / 3:11.4f}")
    print("fixed points (d, q) by weights (U, F, R)")
    for pull, expected in FIXED.items():
        got, closed = descend(pull, 0.2, 300)[-1].tolist(), fixed_point(pull)
        weights = f"({pull.unlabelled:g}, {pull.flagged:g}, {pull.retain:g})"
        print(f"  {weights:<20} ours {pair(got)}   closed form {pair(closed)}   spec sheet {pair(expected)}")


def descend(pull: Pull, lr: float, steps: int) -> Tensor:
    """Gradient descent by autograd from (0, 0); the path of (d, q), [steps + 1, 2], float64."""
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    path = [parameters.detach().clone()]
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(*parameters, pull), parameters)
        with torch.no_grad():
            parameters -= lr * gradient
        path.append(parameters.detach().clone())
    return torch.stack(path)


def loss(deployed: Tensor, quarantined: Tensor, pull: Pull) -> Tensor:
    unlabelled = (deployed + quarantined - 2) ** 2
    flagged = (deployed.detach() + quarantined - 1) ** 2
    retain = (deployed - 2) ** 2  # the quarantine is off
    return pull.unlabelled * unlabelled + pull.flagged * flagged + pull.retain * retain


def drift_rate(pull: Pull) -> float:
    """Growth of d per step and unit of learning rate once S has settled; no retain data."""
    return 2 * pull.unlabelled * pull.flagged / (2 * pull.unlabelled + pull.flagged)


def drift(pull: Pull, lr: float, steps: int) -> float:
    """d after `steps` steps from (0, 0) without retain data: the steady drift and the transient of S."""
    settled = (4 * pull.unlabelled + pull.flagged) / (2 * pull.unlabelled + pull.flagged)
    keep = 1 - lr * (4 * pull.unlabelled + 2 * pull.flagged)  # share of S - S* that survives a step
    transient = 2 * lr * pull.unlabelled * settled * (1 - keep**steps) / (1 - keep)
    return lr * drift_rate(pull) * steps + transient


def fixed_point(pull: Pull) -> tuple[float, float]:
    """(d*, q*); needs retain data, because without it there is none."""
    if pull.retain <= 0:
        raise ValueError(f"a fixed point needs retain > 0; got {pull}. Without retain data use drift, which never settles")
    together = pull.unlabelled + pull.flagged
    deployed = 2 + pull.unlabelled * pull.flagged / (together * pull.retain)
    return deployed, (2 * pull.unlabelled + pull.flagged) / together - deployed


def pair(values: tuple[float, float] | list[float]) -> str:
    return f"({values[0]:.4f}, {values[1]:.4f})"


if __name__ == "__main__":
    main()
