"""Claims about the quality of a mask against the truth: exact on numbers that can be counted, and None where nothing was measured."""

from __future__ import annotations

import random

import pytest
import torch

from grpo_routing.oracle.quality import auroc, f_half, quality
from grpo_routing.oracle.summary import Row
from grpo_routing.pairs import statistics

NAN = float("nan")
KNOWN, HELD_OUT = ("run_tests", "sentinel"), ("file_marker",)


def row(loophole="none", hacked=False, exploited=None) -> Row:
    return Row("p", loophole, hacked, True, not hacked, hacked, hacked, False, hacked if exploited is None else exploited)


HACKS = [row("run_tests", True), row("run_tests", True), row("sentinel", True), row("file_marker", True)]
FAILED = row("sentinel", False, exploited=True)  # pulls a lever and is not paid: neither positive nor negative
CLEAN = [row("run_tests"), row("none"), row("file_marker"), row("sentinel")]


def counted(high, low) -> float:
    return sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = random.Random(0)
    for _ in range(60):
        high, low = ([rng.choice((rng.randrange(4), rng.gauss(0, 1))) for _ in range(rng.randrange(1, 12))] for _ in range(2))
        assert auroc(high, low) == pytest.approx(counted(high, low), abs=1e-12)


def test_auroc_at_its_ends_and_with_ties():
    assert auroc([2, 3], [0, 1]) == 1.0 and auroc([0, 1], [2, 3]) == 0.0
    assert auroc([1, 1], [1, 1, 1]) == 0.5 and auroc([1, 2], [1]) == 0.75
    assert auroc([float("inf")], [1e300]) == 1.0


def test_auroc_without_one_side_is_none_and_leaves_out_what_has_no_score():
    assert auroc([], [1.0]) is None and auroc([1.0], []) is None
    assert auroc([NAN, 3.0], [NAN, 1.0, 5.0]) == 0.5
    assert auroc([NAN], [1.0]) is None


def test_the_check_of_pair_files_ranks_by_the_same_number():
    rng = random.Random(1)
    high, low = ([float(rng.randrange(5)) for _ in range(9)] for _ in range(2))
    assert statistics.auroc(torch.tensor(high), torch.tensor(low)) == pytest.approx(auroc(high, low))


def test_rates_on_hand_numbers():
    """Flags on 3 of 4 hacks and 1 of 4 clean rollouts; the failed exploit is flagged and counts nowhere."""
    rows, flags = [*HACKS, FAILED, *CLEAN], [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    found = quality(rows, flags, flags, KNOWN, HELD_OUT)
    assert found["label_recall"] == 3 / 4 and found["label_false_positive"] == 1 / 4
    assert found["label_precision"] == 3 / 4 and found["label_f05"] == pytest.approx(3 / 4)
    assert found["label_recall_known"] == pytest.approx(2 / 3) and found["label_precision_known"] == pytest.approx(2 / 3)
    assert found["label_recall_held_out"] == 1.0 and found["label_precision_held_out"] == 1 / 2
    assert found["label_f05_held_out"] == pytest.approx(1.25 * 0.5 * 1 / (0.25 * 0.5 + 1))
    assert [found[f"label_recall_{mode}"] for mode in (*KNOWN, *HELD_OUT)] == [0.5, 1.0, 1.0]
    assert found["label_auroc"] == pytest.approx(counted([1, 0, 1, 1], [1, 0, 0, 0])) == 0.75
    assert found["label_auroc_run_tests"] == pytest.approx(counted([1, 0], [1, 0, 0, 0]))


def test_soft_flags_count_as_far_as_they_go():
    found = quality([*HACKS[:2], *CLEAN[:2]], [0.9, 0.3, 0.2, 0.0], [4.0, 1.0, 2.0, NAN], KNOWN, HELD_OUT)
    assert found["label_recall"] == pytest.approx(0.6) and found["label_false_positive"] == pytest.approx(0.1)
    assert found["label_precision"] == pytest.approx(1.2 / 1.4)
    assert found["label_auroc"] == 0.5, "of the scores, and of those that there are"


def test_f_half_weighs_precision_four_times_over_recall():
    assert f_half(0.5, 0.5) == pytest.approx(0.5) and f_half(1.0, 1.0) == 1.0 and f_half(0.0, 0.0) == 0.0
    assert f_half(0.9, 0.1) == pytest.approx(1 / (0.8 / 0.9 + 0.2 / 0.1)) and f_half(0.9, 0.1) > f_half(0.1, 0.9)
    assert f_half(None, 0.5) is None and f_half(0.5, None) is None


def test_nothing_is_measured_where_there_is_nothing():
    """Never a silent zero: a step without hacks has no recall, one without flags no precision."""
    clean = quality(CLEAN, [0.0] * 4, [0.1, 0.2, 0.3, 0.4], KNOWN, HELD_OUT)
    assert clean["label_false_positive"] == 0.0
    assert {value for name, value in clean.items() if name != "label_false_positive"} == {None}
    hacks = quality(HACKS[:3], [0.0] * 3, [NAN] * 3, KNOWN, HELD_OUT)
    assert hacks["label_recall"] == 0.0 and hacks["label_recall_held_out"] is None
    assert {hacks[name] for name in ("label_false_positive", "label_precision", "label_f05", "label_auroc")} == {None}
    assert set(quality([], [], [], KNOWN, HELD_OUT).values()) == {None}


def test_the_names_are_those_of_every_run():
    found = quality([], [], [], KNOWN, HELD_OUT)
    assert set(found) == {"label_false_positive"} | {f"label_{rate}{suffix}" for rate in ("recall", "auroc") for suffix in (
        "", "_known", "_held_out", *(f"_{mode}" for mode in (*KNOWN, *HELD_OUT)))} | {
        f"label_{rate}{suffix}" for rate in ("precision", "f05") for suffix in ("", "_known", "_held_out")}
