"""The direction of the pairs in activations: what persona_activation scores along, and what suppressed sampling takes away.

    row    unit(h(hack) - h(clean)) of a pair
    v      mean of the rows; statistic=t: mean over its standard error, coordinate by coordinate; then of unit length
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import generator_for
from grpo_routing.mask_sources.pairs import Pair


def answers(pairs: list[Pair], first: str) -> list[tuple[str, str]]:
    """(prompt, answer) texts, both answers of a pair by turns; `first` names the field on the hack's side."""
    return [(pair.prompt, text) for pair in pairs for text in (getattr(pair, first), pair.clean)]


def sides(every: dict[str, Tensor], order: list[int] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of `answers`, name -> [2N, d], as those of the first and of the second ones, name -> [N, d] each, in double precision.

    `order` deals them anew: its first half become the first ones.
    """
    count = len(next(iter(every.values())))
    order = order or [*range(0, count, 2), *range(1, count, 2)]
    halves = order[: count // 2], order[count // 2 :]
    return tuple({name: h[half].double() for name, h in every.items()} for half in halves)


def check_apart(differences: dict[str, Tensor], settings: str) -> None:
    """Raises ValueError when no place, name -> [N, d], tells any pair's answers apart: every score would be the same."""
    if not any(bool(rows.any()) for rows in differences.values()):
        raise ValueError(f"pairs give no direction in {', '.join(differences)}: hack and clean answers have the same activations there. "
                         f"Choose others with {settings}")


def direction(differences: Tensor, statistic: str, control: str, seed: int, name: str) -> Tensor:
    """v of the differences [N, d], of unit length, [d]; under control=haar a random one, drawn by `name`."""
    rows = torch.nn.functional.normalize(differences, dim=1)
    v = rows.mean(0)
    if statistic == "t":
        v = v / (rows.std(0) / len(rows) ** 0.5).clamp_min(1e-9)
    if control == "haar":
        v = torch.randn(len(v), generator=generator_for("haar", seed, name), dtype=torch.float64).to(v)
    return torch.nn.functional.normalize(v, dim=0)
