"""How well scores rank two sides: pure functions of numbers, so that each can be checked by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_accuracy(first: Tensor, second: Tensor) -> float:
    """Share of pairs whose first side scores higher; a tie counts half. [N], [N]."""
    return float(((first > second).double() + 0.5 * (first == second).double()).mean())


def auroc(first: Tensor, second: Tensor) -> float:
    """Chance that a random score of the first side exceeds a random one of the second; a tie counts half. [N], [M]."""
    return paired_accuracy(first[:, None], second[None, :])


def standardised_gap(first: Tensor, second: Tensor) -> float:
    """d': difference of the means over the root mean of the two variances; 0 when all scores are the same."""
    gap = first.mean() - second.mean()
    spread = ((first.var() + second.var()) / 2).sqrt()
    return float(gap / spread) if spread > 0 else float(gap.sign() * torch.inf) if gap else 0.0


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r; 0 when either does not vary. [N], [N]."""
    x, y = x - x.mean(), y - y.mean()
    length = x.norm() * y.norm()
    return float(x @ y / length) if length > 0 else 0.0


def residualised(scores: Tensor, by: Tensor) -> Tensor:
    """Scores minus their least-squares line in `by`; of a `by` that does not vary, minus their mean. [N], [N] -> [N]."""
    scores, by = scores - scores.mean(), by - by.mean()
    power = by @ by
    return scores - by * (scores @ by / power) if power > 0 else scores
