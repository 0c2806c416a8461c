"""The statistics of a comparison are what hand, closed form and simulation say they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from grpo_routing import statistics
from grpo_routing.by_source import interval as student_interval
from grpo_routing.statistics import (
    ENUMERATED,
    MATCHED,
    NEAR,
    RESAMPLES,
    UNMATCHED,
    Interval,
    Spread,
    gate,
    holm,
    interval,
    minimum_detectable,
    pareto,
    power,
    sem,
    sign_flip,
    smallest_p,
    spread,
)


def table(by_seed: list[float], problems: int = 4) -> np.ndarray:
    """Differences whose problems all agree."""
    return np.repeat(np.array(by_seed)[:, None], problems, axis=1)


def crossed(random: np.random.Generator, shape: tuple[int, int], truth: float, seed: float, problem: float, rest: float) -> np.ndarray:
    """Differences with an effect of every seed, of every problem, which all seeds share, and of both together."""
    seeds, problems = shape
    return truth + random.normal(0, seed, (seeds, 1)) + random.normal(0, problem, (1, problems)) + random.normal(0, rest, shape)


# ------------------------------------------------------------------------------------------------ intervals


def test_differences_that_all_agree_have_no_width():
    assert interval(table([0.25] * 3)) == Interval(0.25, 0.25, 0.25)
    assert interval(table([0.25] * 3)).turned() == Interval(-0.25, -0.25, -0.25)


def test_a_single_seed_bounds_nothing():
    assert interval(table([0.25])) == Interval(0.25, -math.inf, math.inf)
    assert (sign_flip(table([0.25])), sem(table([0.25]))) == (1.0, math.inf)


def test_with_seeds_alone_the_width_is_students():
    by_seed = list(np.random.default_rng(0).normal(0.3, 0.1, 20))
    mean, low, high = student_interval(by_seed)
    found = interval(table(by_seed))
    assert found.mean == pytest.approx(mean)
    assert found.high - found.low == pytest.approx(high - low, rel=0.06)


def test_with_problems_alone_the_width_is_the_normals():
    """A problem that all seeds answer alike is one observation, not one per seed."""
    one = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=(1, 200))
    found = interval(np.repeat(one, 5, axis=0))
    assert found.high - found.low == pytest.approx(2 * norm.ppf(0.975) * one.std() / math.sqrt(200), rel=0.05)


@pytest.mark.parametrize(("seeds", "seed", "problem"), [(3, 0.1, 0.0), (5, 0.1, 0.3), (5, 0.0, 0.4), (10, 0.1, 0.2)])
def test_the_truth_lies_within_in_95_of_100(seeds, seed, problem):
    random, hits, times = np.random.default_rng(2), 0, 400
    for _ in range(times):
        found = interval(crossed(random, (seeds, 60), 0.2, seed, problem, 0.3), resamples=400)
        hits += found.low <= 0.2 <= found.high
    assert 0.93 <= hits / times <= 0.99  # 0.95 but for chance (0.011) and for the noise that both levels contain


def test_intervals_that_forget_the_shared_problems_hold_too_rarely():
    """Why problems are not drawn within seeds, and why a t-interval over seeds says nothing about other problems (docs/evidence.md)."""
    random, hits, times = np.random.default_rng(6), np.zeros(3), 300
    for _ in range(times):
        differences = crossed(random, (5, 60), 0.2, 0.08, 0.4, 0.4)
        drawn = differences[random.integers(5, size=(200, 5))]
        within = np.take_along_axis(drawn, random.integers(60, size=drawn.shape), axis=2).mean((1, 2))
        ours, (_, low, high) = interval(differences, resamples=400), student_interval(list(differences.mean(1)))
        for place, (least, most) in enumerate(((ours.low, ours.high), np.quantile(within, [0.025, 0.975]), (low, high))):
            hits[place] += least <= 0.2 <= most
    ours, within, student = hits / times
    assert ours > 0.93 and within < 0.9 and student < 0.9, (ours, within, student)


def test_an_interval_is_the_same_every_time_and_ends_where_rates_do():
    differences = crossed(np.random.default_rng(3), (4, 30), 0.9, 0.1, 0.1, 0.1)
    first = interval(differences)
    statistics.weights.cache_clear()
    assert interval(differences) == first
    assert first.high == 1.0 and interval(-differences).low == -1.0


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((0, 4)), np.array([[0.0, math.nan]])])
def test_what_is_no_table_of_differences_is_refused(wrong):
    for of in (interval, sign_flip, sem, spread):
        with pytest.raises(ValueError, match=r"expected finite differences \[seeds, problems\], at least one; got shape"):
            of(wrong)


# ------------------------------------------------------------------------------------------------ p-values


@pytest.mark.parametrize(("by_seed", "p"), [
    ([0.1, 0.2, 0.3], 2 / 8),  # all agree
    ([0.3, -0.1, 0.2], 4 / 8),  # of 6 4 2 0 0 2 4 6 tenths four are at least 4
    ([0.2, -0.2], 1.0), ([0.0, 0.0, 0.0], 1.0), ([0.1] * 5, 2 / 32), ([0.1] * 4 + [-0.1], 12 / 32)])
def test_sign_flips_of_few_seeds_are_counted_exactly(by_seed, p):
    assert sign_flip(table(by_seed)) == pytest.approx(p)
    assert sign_flip(-table(by_seed)) == pytest.approx(p)


def test_beyond_that_flips_are_drawn_and_counted_themselves():
    assert 2**ENUMERATED <= RESAMPLES < 2 ** (ENUMERATED + 1)
    assert sign_flip(table([0.1] * 20)) == pytest.approx(2 / (RESAMPLES + 1)) == smallest_p(20)
    mixed = list(np.random.default_rng(4).normal(0.02, 0.1, 20))
    assert sign_flip(table(mixed)) == sign_flip(table(mixed))
    assert [smallest_p(5), smallest_p(6), smallest_p(10)] == [2 / 32, 2 / 64, 2 / 1024]


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 would be less than the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


# ------------------------------------------------------------------------------------------------ gate and front


def test_the_gate_asks_for_the_whole_interval():
    assert gate(Interval(0.02, -0.05, 0.1), 0.1) == MATCHED
    assert gate(Interval(-0.05, -0.12, 0.02), 0.1) == NEAR
    assert gate(Interval(-0.11, -0.12, -0.10), 0.1) == gate(Interval(0.2, 0.1, 0.3), 0.1) == UNMATCHED
    assert gate(Interval(0.0, -math.inf, math.inf), 0.1) == NEAR  # one seed
    with pytest.raises(ValueError, match="a gate is wider than 0; got 0"):
        gate(Interval(0, 0, 0), 0)


def test_the_front_keeps_what_no_other_beats():
    assert pareto([(0.9, 0.1), (0.1, 0.5), (0.05, 0.3), (0.1, 0.4), (0.1, 0.5)]) == [False, True, True, False, True]


# ------------------------------------------------------------------------------------------------ power


def test_power_agrees_with_the_tables_of_the_paired_t_test():
    """Half a deviation, 34 pairs, two-sided 0.05: G*Power gives 0.8078; 0.8 deviations and 15 pairs give 0.8213."""
    assert power(0.5, 34, Spread(1.0, 0.0, 1)) == pytest.approx(0.8078, abs=1e-4)
    assert power(0.8, 15, Spread(1.0, 0.0, 1)) == pytest.approx(0.8213, abs=1e-4)
    assert power(0.0, 10, Spread(1.0, 0.0, 1)) == pytest.approx(0.05)
    large = power(0.1, 400, Spread(1.0, 0.0, 1))
    assert large == pytest.approx(norm.sf(norm.ppf(0.975) - 2) + norm.cdf(norm.ppf(0.025) - 2), abs=2e-3)


def test_power_is_that_of_the_sign_flips():
    random, deviation = np.random.default_rng(5), Spread(0.1, 0.0, 1)
    found = np.mean([sign_flip(random.normal(0.1, 0.1, (8, 1))) <= 0.05 for _ in range(200)])
    assert found == pytest.approx(power(0.1, 8, deviation), abs=0.08)


def test_too_few_seeds_find_nothing():
    """Five seeds that agree have p = 0.0625."""
    assert power(1.0, 5, Spread(0.01, 0.0, 1)) == 0.0 < power(1.0, 6, Spread(0.01, 0.0, 1))
    assert minimum_detectable(5, Spread(0.01, 0.0, 1)) == math.inf


@pytest.mark.parametrize("seeds", [6, 10, 40])
def test_what_can_just_be_found_is_found_four_times_in_five(seeds):
    deviation = Spread(0.08, 0.5, 100)
    assert power(minimum_detectable(seeds, deviation), seeds, deviation) == pytest.approx(0.8)
    assert minimum_detectable(seeds, Spread(0, 0, 4)) == 0.0


def test_the_spread_within_a_seed_is_taken_off_that_between_them():
    differences = np.array([[0.0, 1.0], [1.0, 0.0], [3.0, 2.0]])  # residuals ∓2/3, ±1/3, ±1/3 with 2 degrees; seed means vary by 4/3
    found = spread(differences)
    assert (found.within**2, found.between**2, found.problems) == pytest.approx((2 / 3, 1.0, 2))
    assert found.of_seed**2 == pytest.approx(4 / 3) and sem(differences) == pytest.approx(math.sqrt(4 / 9))
    assert spread(np.array([[0.0, 1.0], [1.0, 0.0]])).between == 0.0
    assert spread(np.array([[0.0, 1.0], [0.0, 1.0]])).of_seed == 0.0  # the problems differ, the seeds do not
    with pytest.raises(ValueError, match="a spread needs two seeds and two problems; got 1 and 2"):
        spread(differences[:1])
