"""Does a reading of the pairs tell hack from clean on pairs that it never saw, and is it more than their length?

    score         unit(x) . v, v the mean difference of all other pairs (leave one out), as a gradient or an activation (products.py)
    paired        share of pairs whose hack scores above their clean answer; AUROC: of any hack above any clean answer
    chance        95 % quantile of the same statistic when hack and clean are swapped within pairs at random
    less length   the score minus its least-squares line in log(tokens of the completion)

Both readings are of the untrained policy. A pair left out of a file that is keyed by loophole still has pairs of its own
loophole among the others, so the check says nothing about loopholes that the pairs do not know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.pairs import Pair, PairFileError, load_pairs
from grpo_routing.pairs.products import activation_products, gradient_products, token_counts
from grpo_routing.pairs.statistics import auroc, correlation, paired_accuracy, residualised, standardised_gap
from grpo_routing.policy import Policy

LEAST, SWAPS, QUANTILE = 4, 200, 0.95


@dataclass(frozen=True)
class Reading:
    """What one reading says of the pairs; `chance` holds what swapped labels reach, by the same names."""

    name: str
    paired: float
    auroc: float
    less_length: float
    gap: float
    with_length: float
    chance: dict[str, float]

    @property
    def verdict(self) -> str:
        found, limit = f"{self.name} ({self.auroc:.2f}, chance reaches {self.chance['auroc']:.2f})", self.chance["less_length"]
        if self.auroc <= self.chance["auroc"]:
            within = self.paired > self.chance["paired"]
            return f"{found} {'separates within pairs only, not across prompts' if within else 'does not separate beyond chance'}"
        if self.less_length <= limit:
            return f"{found} separates, but not once length is taken out ({self.less_length:.2f}, chance reaches {limit:.2f})"
        return f"{found} separates beyond chance, also with length taken out"


def usable_pairs(file: str, known: tuple[str, ...]) -> list[Pair]:
    """Raises PairFileError, also for fewer pairs than can be left out one at a time."""
    pairs = load_pairs(file, known)
    if len(pairs) < LEAST:
        raise PairFileError(f"{file}: {len(pairs)} pairs to read; leaving one out needs at least {LEAST}. Write more pairs")
    return pairs


def report(name: str, policy: Policy, pairs: list[Pair]) -> str:
    """The table of both readings and the verdict."""
    lengths = token_counts(policy, pairs)
    signs = swaps(len(pairs))
    readings = [read("gradient", gradient_products(policy, pairs), lengths, signs),
                read("activation", activation_products(policy, pairs), lengths, signs)]
    hack, clean = lengths.mean(1).tolist()
    lines = [f"{name}: {len(pairs)} pairs ({', '.join(sorted({pair.loophole for pair in pairs}))}); "
             f"tokens of hack {hack:.1f}, clean {clean:.1f}; each pair under the direction of the others", "",
             f"{'reading':<12}{'paired (chance)':>18}{'AUROC (chance)':>18}{'less length':>18}{'d′':>10}{'r(log length)':>16}"]
    for one in readings:
        cells = "".join(f"{f'{getattr(one, key):.2f} ({one.chance[key]:.2f})':>18}" for key in ("paired", "auroc", "less_length"))
        lines.append(f"{one.name:<12}{cells}{one.gap:>10.2f}{one.with_length:>16.2f}")
    alone, band = auroc(*lengths), length_band(lengths, signs)
    lines += [f"{'length alone':<12}{paired_accuracy(*lengths):>11.2f}{alone:>18.2f}", ""]
    told = "tells the sides apart" if abs(alone - 0.5) > band else "explains nothing beyond chance"
    return "\n".join([*lines, f"verdict: {'; '.join(one.verdict for one in readings)}; "
                              f"length alone {told} ({alone:.2f}, chance 0.50 ± {band:.2f})."])


# ---------------------------------------------------------------------------------------------- leave one out


def read(name: str, products: Tensor, lengths: Tensor, signs: Tensor) -> Reading:
    """Judge a reading by its products [2, N, N] (`held_out_scores`)."""
    found = judged(products, lengths, torch.ones(products.shape[1], dtype=products.dtype))
    swapped = [judged(products, lengths, row) for row in signs]
    chance = {key: float(torch.tensor([one[key] for one in swapped]).quantile(QUANTILE)) for key in ("paired", "auroc", "less_length")}
    return Reading(name, **found, chance=chance)


def judged(products: Tensor, lengths: Tensor, signs: Tensor) -> dict[str, float]:
    scores, log_lengths = held_out_scores(products, signs), lengths.log()
    rest = residualised(scores.flatten(), log_lengths.flatten()).view_as(scores)
    hack, clean = sides(scores, signs)
    return {"paired": paired_accuracy(hack, clean), "auroc": auroc(hack, clean), "less_length": auroc(*sides(rest, signs)),
            "gap": standardised_gap(hack, clean), "with_length": correlation(scores.flatten(), log_lengths.flatten())}


def held_out_scores(products: Tensor, signs: Tensor) -> Tensor:
    """Score of both sides of each pair under the mean of the other pairs' differences, [2, N].

    signs [N] are -1 for pairs that are swapped, else 1.
    """
    own = products.diagonal(dim1=1, dim2=2) * signs
    return (products @ signs - own) / (len(signs) - 1)


def sides(values: Tensor, signs: Tensor) -> Tensor:
    """Values [2, N] with the rows of swapped pairs exchanged."""
    return torch.where(signs > 0, values, values.flip(0))


def swaps(count: int) -> Tensor:
    """Which pairs are swapped in each permutation, [SWAPS, count] of 1 and -1; the same whenever it is asked."""
    return torch.randint(0, 2, (SWAPS, count), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def length_band(lengths: Tensor, signs: Tensor) -> float:
    """How far from 0.5 swapped labels bring the AUROC of length."""
    return float(torch.tensor([abs(auroc(*sides(lengths, row)) - 0.5) for row in signs]).quantile(QUANTILE))
