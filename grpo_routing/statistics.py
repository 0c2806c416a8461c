"""What may be said of a difference between two arms. Pure functions; nothing here reads a file.

Two arms with the same seeds answer the same evaluation problems, so everything starts from d[s, p], the difference of seed s on problem
p. Both are samples, of trainings and of problems, and they are crossed, not nested: every seed answers the same problems.

    interval            95 %, a bootstrap over seeds and problems
    sign_flip, holm     p-value over seeds, and its correction for the number of comparisons
    gate, pareto        is the difference one at equal solve, and which arms does no other beat in both
    power, minimum_detectable    before a sweep: what can so many seeds find
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from scipy.optimize import brentq
from scipy.stats import ncf, norm, permutation_test
from scipy.stats import t as student

RESAMPLES = 10_000  # of the bootstrap, and of the sign flips where all are too many
ENUMERATED = 13  # seeds: up to here all 2**n <= RESAMPLES sign flips are looked at
LEVEL = 0.95
MATCHED, NEAR, UNMATCHED = GATES = ("matched", "near", "unmatched")


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % bounds, which are infinite for a single seed."""

    mean: float
    low: float
    high: float

    def turned(self) -> Interval:
        """Of the difference with the other sign."""
        return Interval(0.0 - self.mean, 0.0 - self.high, 0.0 - self.low)  # no -0.0


def generator(*name: object) -> np.random.Generator:
    """Random numbers that belong to a name, whatever was drawn before."""
    return np.random.default_rng(int.from_bytes(sha256("/".join(map(str, name)).encode()).digest()[:8], "big"))


def interval(differences: np.ndarray, resamples: int = RESAMPLES) -> Interval:
    """Mean of d [n seeds, m problems], differences of shares, with a 95 % percentile interval: for other seeds and other problems.

    Seeds and problems are drawn with replacement, independently; a problem that is drawn is drawn for all seeds (two-way bootstrap, Owen
    2007, "The pigeonhole bootstrap"). Drawing problems anew within every seed would treat a problem that is hard for all seeds as n
    independent ones: simulated, such intervals held the truth in 82 % of cases (5 seeds, tests/test_statistics.py). Ours differs from the
    paper's in two ways. The deviations of seeds and of problems are added without their interaction, which both already contain. And those
    of seeds are stretched by sqrt(n / (n - 1)) t / z, because the percentiles of few seeds are too narrow: with seeds alone the interval
    has the width of Student's. Raises ValueError for what is no such table.
    """
    seeds, problems = checked(differences).shape
    mean = float(differences.mean())
    if seeds == 1:
        return Interval(mean, -math.inf, math.inf)
    tail = (1 + LEVEL) / 2
    stretch = math.sqrt(seeds / (seeds - 1)) * student.ppf(tail, seeds - 1) / norm.ppf(tail)
    of_seeds, of_problems = weights(seeds, problems, resamples)
    drawn = stretch * (of_seeds @ (differences.mean(1) - mean)) + of_problems @ (differences.mean(0) - mean)
    low, high = np.quantile(drawn, [1 - tail, tail])
    return Interval(mean, max(-1.0, mean + float(low)), min(1.0, mean + float(high)))


@lru_cache(maxsize=4)  # an experiment has few shapes, and its comparisons may share the draws
def weights(seeds: int, problems: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each problem is drawn, as shares: [resamples, seeds], [resamples, problems]."""
    random = generator("bootstrap", seeds, problems)
    return tuple(random.multinomial(size, np.full(size, 1 / size), size=resamples) / size for size in (seeds, problems))


def checked(differences: np.ndarray) -> np.ndarray:
    if differences.ndim != 2 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(f"expected finite differences [seeds, problems], at least one; got shape {differences.shape}. "
                         "Pair the arms by seed and problem first")
    return differences


def sem(differences: np.ndarray) -> float:
    """Standard error of the mean over seeds of d [n, m]; infinite for a single seed."""
    by_seed = checked(differences).mean(1)
    return float(by_seed.std(ddof=1) / math.sqrt(len(by_seed))) if len(by_seed) > 1 else math.inf


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value of the mean over seeds of d [n, m] when every seed's sign is arbitrary (the two arms are exchangeable).

    Exact up to ENUMERATED seeds, which gives no p below `smallest_p`; beyond, RESAMPLES random flips of a fixed seed, themselves counted.
    """
    by_seed = checked(differences).mean(1)
    if len(by_seed) == 1:
        return 1.0
    return float(permutation_test((by_seed,), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
                                  rng=generator("sign flips", len(by_seed))).pvalue)


def smallest_p(seeds: int) -> float:
    """The p-value of seeds that all agree."""
    return 2 / 2**seeds if seeds <= ENUMERATED else 2 / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) correction, in the given order: the k-th smallest of m is multiplied by m - k + 1, and the order stays."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def gate(solve: Interval, within: float) -> str:
    """Whether a difference in hack is one at equal solve: `matched` when the whole interval of the solve difference lies within ±within,
    `near` when only its mean does, else `unmatched`. Raises ValueError for a width that is not positive."""
    if within <= 0:
        raise ValueError(f"a gate is wider than 0; got {within}. Give the difference in solve rate that counts as none, such as 0.1")
    if abs(solve.mean) > within:
        return UNMATCHED
    return MATCHED if -within <= solve.low and solve.high <= within else NEAR


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (hack, solve) points, those that no other beats: hacks no more and solves no less, and differs. Means only, no uncertainty."""
    return [not any(hack <= own[0] and solve >= own[1] and (hack, solve) != own for hack, solve in points) for own in map(tuple, points)]


# ------------------------------------------------------------------------------------------------ before a sweep


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a difference of rates: between seeds (of what each would be over all problems), and within a seed between
    problems (beyond what a problem does in all seeds alike, which moves no seed from the others); how many problems a seed answers."""

    between: float
    within: float
    problems: int

    @property
    def of_seed(self) -> float:
        """Of the mean over the problems of one seed."""
        return math.sqrt(self.between**2 + self.within**2 / self.problems)


def spread(differences: np.ndarray) -> Spread:
    """Both parts from d [n, m], by analysis of variance. Raises ValueError below two seeds or two problems."""
    seeds, problems = checked(differences).shape
    if min(seeds, problems) < 2:
        raise ValueError(f"a spread needs two seeds and two problems; got {seeds} and {problems}. Run another seed")
    rest = differences - differences.mean(1, keepdims=True) - differences.mean(0) + differences.mean()
    within = float((rest**2).sum() / ((seeds - 1) * (problems - 1)))
    between = max(0.0, float(differences.mean(1).var(ddof=1)) - within / problems)
    return Spread(math.sqrt(between), math.sqrt(within), problems)


def power(effect: float, seeds: int, deviation: Spread, alpha: float = 1 - LEVEL) -> float:
    """Chance that `seeds` seeds show a mean difference of `effect` at two-sided `alpha`: that of the paired t-test, which the sign flips
    come close to; 0 where so few seeds have no p-value that small."""
    if smallest_p(seeds) > alpha:
        return 0.0
    if deviation.of_seed == 0:
        return float(effect != 0)
    shift, edge = abs(effect) * math.sqrt(seeds) / deviation.of_seed, student.ppf(1 - alpha / 2, seeds - 1)
    if shift == 0:
        return alpha
    return float(ncf.sf(edge**2, 1, seeds - 1, shift**2))  # of t squared: scipy's noncentral t is not a number for large shifts


def minimum_detectable(seeds: int, deviation: Spread, alpha: float = 1 - LEVEL, wanted: float = 0.8) -> float:
    """The smallest difference that is found with power `wanted`; infinite where so few seeds find nothing at `alpha`."""
    if smallest_p(seeds) > alpha:
        return math.inf
    unit = deviation.of_seed / math.sqrt(seeds)
    if unit == 0:
        return 0.0
    enough = unit * (student.ppf(1 - alpha / 2, seeds - 1) + 10)
    return float(brentq(lambda effect: power(effect, seeds, deviation, alpha) - wanted, 0, enough))
