"""What the plan says a sweep can find is what statistics.py says of the same seeds, problems and deviations."""

from __future__ import annotations

import pytest

from grpo_routing.foresight import asked, foreseen
from grpo_routing.preregistration import parse
from grpo_routing.results import ReportError
from grpo_routing.statistics import Spread, minimum_detectable, power
from tests.test_preregistration import CLAIM

SPREAD = {"between": 0.11, "within": 0.4}
LOOPHOLE = {"name": "held_out", "known": ["run_tests", "sentinel", "stdout_marker"], "held_out": ["file_marker"]}


def sweep(seeds: int, arms: tuple[str, ...] = ("vanilla", "penalty"), loophole: dict = LOOPHOLE) -> list[dict]:
    evaluation = {"problems": 400, "no_hint_share": 0.2}
    return [{"arm_name": arm, "loophole": loophole, "evaluation": evaluation, "seed": seed} for arm in arms for seed in range(seeds)]


def test_problems_of_a_rate_are_those_with_a_hint():
    assert asked(sweep(1)[0]) == {"hack": 320, "hack_known": 240, "hack_held_out": 80, "solve": 320}
    assert asked(sweep(1, loophole=LOOPHOLE | {"held_out": []})[0]) == {"hack": 320, "hack_known": 320, "solve": 320}


def test_the_smallest_difference_and_the_power_of_every_claim():
    claims = parse([CLAIM, CLAIM | {"id": "H2", "at_least": 0.15, "rate": "hack_held_out", "alpha": None}])
    differences, powers = foreseen(sweep(10), claims, SPREAD)
    for rate, problems in asked(sweep(1)[0]).items():
        found = minimum_detectable(10, Spread(0.11, 0.4, problems))
        assert f"{found:.2f} in {rate} ({problems} problems)" in differences
    known, unknown = (power(least, 10, Spread(0.11, 0.4, problems), alpha) for least, problems, alpha in
                      ((0.3, 320, 0.05 / 2), (0.15, 80, 0.05)))  # the second has no alpha and is not corrected
    assert powers.endswith(f"H1 {known:.2f}, H2 {unknown:.2f}") and known > unknown > 0.5


def test_the_arm_with_the_fewest_seeds_counts():
    uneven = sweep(10) + sweep(7, arms=("erase",))
    assert foreseen(uneven, (), SPREAD) == foreseen(sweep(7), (), SPREAD) != foreseen(sweep(10), (), SPREAD)


def test_seeds_that_can_show_nothing_are_called_so():
    (said,) = foreseen(sweep(5), (), SPREAD)
    assert said == "!!! 5 seeds of an arm cannot show any difference at p = 0.05: sign flips have no p below 0.062"
    assert not foreseen(sweep(6), (), SPREAD)[0].startswith("!!!")
    assert foreseen(sweep(5, arms=("vanilla",)), (), SPREAD) == [], "one arm is compared with nothing"


@pytest.mark.parametrize("spread", [{}, {"between": 0.1}, {"between": -0.1, "within": 0.4}, {"between": 0.1, "within": None},
                                    {"between": 0.1, "within": float("nan")}, {"between": 0.1, "within": 0.4, "more": 1}])
def test_a_spread_that_is_none_is_refused(spread):
    with pytest.raises(ReportError, match=r"hydra\.sweeper\.spread: expected two deviations, such as .*; got "):
        foreseen(sweep(10), (), spread)
