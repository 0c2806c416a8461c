"""Claims about calibration: from scores to labels, by every rule, on numbers that can be checked by hand.

T-numbers are the property tests of graft.md §6.1.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from grpo_routing import build
from grpo_routing.mask_sources.calibration import FORGOTTEN, RULES, Calibration, weighted_quantile
from grpo_routing.mask_sources.view import StepView
from grpo_routing.types import STUDENT, Labels, Rollout

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
RANKED = ("quantile", "group")
PLAIN = {"rule": "quantile", "threshold": 0.0, "share": 0.25, "trusted_threshold": None, "trusted_share": 0.0, "decay": 0.9, "pilot": 2,
         "softness": 0.0}


def calibration(**change) -> Calibration:
    return Calibration(**PLAIN | change)


def stage(count: int, group: int = 4, step: int = 0, rewards=None, ceiling=None) -> StepView:
    """A step of `count` rollouts, `group` to a prompt, without tokens or policy."""
    rollouts = [Rollout(place // group, (1,), (2,), "", STUDENT) for place in range(count)]
    return StepView(step, rollouts, None, torch.zeros(count, dtype=F64) if rewards is None else rewards, None, None, None, ceiling)


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=F64)


def label(source: Calibration, scores, step=0, memory=None, group=4) -> tuple[Labels, dict]:
    scores = tensor(scores)
    return source(scores, stage(len(scores), group, step), memory if memory is not None else source.prepare(scores))


def told(source: Calibration, scores, **more) -> str:
    """The labels as text: F flagged, T trusted, . neither."""
    labels, _ = label(source, scores, **more)
    return "".join("F" if p else "T" if t else "." for p, t in zip(labels.flagged.tolist(), labels.trusted.tolist()))


def randoms(count, seed=0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------------------------------------ the rules


def test_a_threshold_flags_above_it_and_trusts_below_the_other():
    source = calibration(rule="threshold", threshold=0.5, trusted_threshold=0.0)
    assert told(source, [-1, 0, 0.5, 2, NAN]) == "T..F."
    assert told(calibration(rule="threshold", threshold=0.5), [-1, 0, 0.5, 2, NAN]) == "...F."
    _, memory = label(source, [1.0], memory={"other": tensor(3)})
    assert memory == {"other": tensor(3)}


def test_the_pilot_fixes_both_cuts():
    """Of the pilot itself exactly the shares are labelled; of another batch whatever lies outside its cuts."""
    source = calibration(rule="pilot", share=0.3, trusted_share=0.2)
    memory = source.prepare(tensor([7, 3, NAN, 0, 9, 1, 8, 2, 4, 5, 6]))
    assert memory == {"cut": tensor(6), "trusted_cut": tensor(2)}
    assert told(source, range(10), memory=memory) == "TT.....FFF"
    assert told(source, [6.5, 100, 7, 6], memory=memory) == "FFF."
    assert told(source, [1.5, -9, 2, 3], memory=memory) == "TT.."
    _, after = label(source, range(10), memory=memory)
    assert after is memory, "what the pilot fixed is not changed by training"


@pytest.mark.parametrize("rule", RULES)
def test_only_the_rule_pilot_wants_a_pilot(rule):
    source = calibration(rule=rule, pilot=3)
    assert source.pilot_batches == (3 if rule == "pilot" else 0)
    assert source.prepare(tensor([1, 2])).keys() == ({"cut", "trusted_cut"} if rule == "pilot" else set())


def test_a_pilot_without_scores_flags_and_trusts_nothing():
    source = calibration(rule="pilot", trusted_share=0.25)
    assert told(source, [-5, 0, 5], memory=source.prepare(tensor([NAN, NAN]))) == "..."


def test_history_by_hand():
    """Old 8 and 10, now 4 and 6, the highest 0.6 flagged. Decay 0.5: weights 1 1 .5 .5, of which 0.4 is 1.2, reached at 6.
    Decay 0.1: weights 1 1 .1 .1, of which 0.4 is 0.88, reached at 4, so 6 is flagged."""
    for decay, expected in ((0.5, ".."), (0.1, ".F")):
        source = calibration(rule="history", share=0.6, decay=decay)
        _, memory = label(source, [8, 10], step=0)
        assert memory["history"].tolist() == [[8, 0], [10, 0]]
        assert told(source, [4, 6], step=1, memory=memory) == expected


def by_hand(past: list[tuple[int, float]], now: int, decay: float, share: float) -> float:
    """The smallest score with at least 1 - share of the weight at or below it."""
    weighted = sorted((score, decay ** (now - step)) for step, score in past)
    total, reached = sum(weight for _, weight in weighted), 0.0
    for score, weight in weighted:
        reached += weight
        if reached >= (1 - share) * total - 1e-12:
            return score


@pytest.mark.parametrize("decay", [0.5, 0.9, 1.0])
def test_history_is_the_weighted_quantile_of_all_steps_so_far(decay):
    source, memory, past = calibration(rule="history", share=0.3, trusted_share=0.2, decay=decay), {}, []
    for step in range(8):
        scores = randoms(10, step) + step / 2
        past += [(step, float(score)) for score in scores]
        labels, memory = label(source, scores, step=step, memory=memory)
        kept = [(at, score) for at, score in past if decay ** (step - at) >= FORGOTTEN]
        assert torch.equal(labels.flagged > 0, scores > by_hand(kept, step, decay, 0.3))
        low = -by_hand([(at, -score) for at, score in kept], step, decay, 0.2)
        assert torch.equal(labels.trusted, scores < low)


def test_history_is_bounded_and_survives_as_tensors():
    """Weights below a thousandth are dropped: ten steps at decay one half. What is left comes back from bytes as it was."""
    source, memory = calibration(rule="history", decay=0.5), {}
    for step in range(30):
        _, memory = label(source, randoms(6, step), step=step, memory=memory)
        assert len(memory["history"]) == 6 * min(step + 1, 10)
    again = load(save(memory))
    for step in range(30, 33):
        (one, memory), (other, again) = (label(source, randoms(6, step), step=step, memory=held) for held in (memory, again))
        assert torch.equal(one.flagged, other.flagged) and torch.equal(memory["history"], again["history"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_t7_a_quantile_flags_exactly_its_share(share):
    for count in (1, 2, 3, 7, 16, 37):
        scores = randoms(count, count)
        labels, _ = label(calibration(share=share), scores)
        flags = labels.flagged > 0
        assert int(flags.sum()) == round(share * count) and abs(int(flags.sum()) - share * count) <= 0.5
        assert not flags.any() or flags.all() or scores[flags].min() > scores[~flags].max()


def test_group_flags_its_share_of_every_prompt():
    scores = [1, 2, 3, 4, 40, 30, 20, 10, -1, -2, -3, -4]
    assert told(calibration(rule="group"), scores) == "...FF...F..."
    assert told(calibration(rule="group", trusted_share=0.5), scores) == "TT.FF.TTF.TT"
    assert told(calibration(rule="quantile"), scores) == "....FFF....."


# ------------------------------------------------------------------------------------------------------------ tri-state


@pytest.mark.parametrize("rule", ["pilot", "history", "quantile"])
def test_the_lowest_are_trusted_by_the_same_rule(rule):
    assert told(calibration(rule=rule, share=0.25, trusted_share=0.5), [8, 1, 7, 2, 3, 6, 4, 5]) == "FTFTT.T."
    assert told(calibration(rule=rule, share=0.5, trusted_share=0.5), [8, 1, 7, 2, 3, 6, 4, 5]) == "FTFTTFTF"
    assert told(calibration(rule=rule, share=0.0, trusted_share=0.67), [1, 2, 3]) == "TT."


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("softness", [0.0, 0.5])
def test_nothing_is_flagged_and_trusted(rule, softness):
    """Also where two rounded shares would take the same rollout."""
    for count in (3, 5, 12):
        source = calibration(rule=rule, share=0.5, trusted_share=0.5, trusted_threshold=0.0, softness=softness)
        labels, _ = label(source, randoms(count), group=3)  # Labels would refuse
        assert not (labels.trusted & (labels.flagged > 0)).any() and labels.trusted.any()


# ------------------------------------------------------------------------------------------------------------- softness


@pytest.mark.parametrize("rule", RULES)
def test_a_soft_flag_is_a_probability_that_grows_with_the_score(rule):
    scores = randoms(16).sort().values
    soft, _ = label(calibration(rule=rule, softness=0.3), scores, group=16)
    hard, _ = label(calibration(rule=rule), scores, group=16)
    assert bool(((soft.flagged > 0) & (soft.flagged < 1)).all()) and bool((soft.flagged.diff() > 0).all())
    assert torch.equal(soft.flagged > 0.5, hard.flagged > 0)


def test_a_soft_flag_is_a_half_at_the_cut():
    """(score - cut) in units of the spread: at scores -3 and 3 the spread is 3."""
    labels, _ = label(calibration(rule="threshold", softness=2.0), [-3, 3])
    assert labels.flagged.tolist() == pytest.approx(torch.sigmoid(tensor([-0.5, 0.5])).tolist())
    at, _ = label(calibration(rule="threshold", softness=2.0), [-3, 0, 3])
    assert float(at.flagged[1]) == 0.5
    memory = {"cut": tensor(1.0), "trusted_cut": tensor(-INF)}
    at, _ = label(calibration(rule="pilot", softness=0.1), [1, 2, 0], memory=memory)
    assert float(at.flagged[0]) == 0.5
    ranked, _ = label(calibration(share=0.5, softness=1.0), [0, 2, 4, 6])  # midway between 2 and 4
    assert float(ranked.flagged[1] + ranked.flagged[2]) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", RULES)
def test_softness_fades_into_the_hard_rule(rule):
    scores = randoms(16)
    soft, _ = label(calibration(rule=rule, softness=1e-6), scores)
    hard, _ = label(calibration(rule=rule), scores)
    cut = (soft.flagged - 0.5).abs() < 1e-9  # only a score that is the cut stays at a half
    assert torch.allclose(soft.flagged[~cut], hard.flagged[~cut], atol=1e-9) and int(cut.sum()) <= 1


def test_a_trusted_rollout_keeps_no_probability():
    labels, _ = label(calibration(share=0.25, trusted_share=0.5, softness=1.0), [0, 1, 2, 3])
    assert labels.trusted.tolist() == [True, True, False, False]
    assert labels.flagged[:2].tolist() == [0, 0] and bool((labels.flagged[2:] > 0).all())


# --------------------------------------------------------------------------------------- ranks, missing scores and ties


@pytest.mark.parametrize("rule", ["pilot", "history", "quantile", "group"])
@pytest.mark.parametrize("monotone", [torch.exp, lambda s: 3 * s - 7, torch.atan, lambda s: s**3])
def test_t8_hard_labels_follow_the_order_of_the_scores_alone(rule, monotone):
    source, memories = calibration(rule=rule, share=0.3, trusted_share=0.3), [{}, {}]
    if rule == "pilot":
        memories = [source.prepare(randoms(40, 99)), source.prepare(monotone(randoms(40, 99)))]
    for step in range(3):
        scores = randoms(20, step)
        (one, memories[0]), (other, memories[1]) = (
            label(source, values, step=step, memory=memory) for values, memory in zip((scores, monotone(scores)), memories))
        assert torch.equal(one.flagged, other.flagged) and torch.equal(one.trusted, other.trusted)
        assert one.flagged.any() and one.trusted.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("softness", [0.0, 0.5])
def test_what_has_no_score_is_neither_flagged_nor_trusted(rule, softness):
    source = calibration(rule=rule, share=0.5, trusted_share=0.25, trusted_threshold=0.0, softness=softness)
    for missing in (NAN, INF, -INF):
        labels, _ = label(source, [missing, 5, missing, -4, 3, missing, -2, missing], group=8)
        bare = torch.tensor([True, False, True, False, False, True, False, True])
        assert not labels.flagged[bare].any() and not labels.trusted[bare].any()
        assert labels.flagged[1] > 0 and labels.trusted[3]
        labels, _ = label(source, [missing] * 4)
        assert not labels.flagged.any() and not labels.trusted.any()


@pytest.mark.parametrize("rule", ["pilot", "history", *RANKED])
def test_shares_are_of_those_that_have_a_score(rule):
    assert told(calibration(rule=rule, share=0.5, trusted_share=0.25), [NAN, 5, NAN, -4, 3, NAN, -2, NAN], group=8) == ".F.TF..."


def test_the_scores_are_handed_on_as_they_were():
    labels, _ = label(calibration(), [3, NAN, 1])
    assert labels.scores[[0, 2]].tolist() == [3, 1] and labels.scores[1].isnan()


def test_ties_go_to_the_earlier_by_rank_and_to_nobody_by_cut():
    assert told(calibration(share=0.5), [1, 1, 1, 1]) == "FF.."
    assert told(calibration(share=0.25, trusted_share=0.5), [1, 1, 1, 1]) == "F.TT", "the trusted from the other end"
    assert told(calibration(rule="group", share=0.5), [1, 1, 1, 1], group=2) == "F.F."
    for rule in ("pilot", "history"):
        assert told(calibration(rule=rule, share=0.5), [1, 1, 1, 1]) == "...."
    assert told(calibration(rule="threshold", threshold=1.0), [1, 1]) == ".."


def test_the_weighted_quantile_on_hand_numbers():
    values, weights = tensor([3, 1, 2]), tensor([1, 2, 1])
    assert [float(weighted_quantile(values, weights, share)) for share in (0.1, 0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert float(weighted_quantile(tensor(range(10)), torch.ones(10, dtype=F64), 0.7)) == 6, "0.7 * 10 rounds to above 7"
    assert float(weighted_quantile(values[:0], weights[:0], 0.5)) == INF


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("change", "message"), [
    ({"rule": "top"}, "calibration.rule must be one of threshold, pilot, history, quantile, group; got 'top'"),
    ({"share": -0.1}, "calibration.share and trusted_share are shares of the rollouts, at most 1 together; got -0.1 and 0.0"),
    ({"trusted_share": -0.1}, "at most 1 together; got 0.25 and -0.1"),
    ({"share": 0.6, "trusted_share": 0.5}, "at most 1 together; got 0.6 and 0.5"),
    ({"share": NAN}, "at most 1 together; got nan and 0.0"),
    ({"trusted_threshold": 0.1}, "calibration.trusted_threshold must not exceed threshold; got 0.1 and 0.0"),
    ({"decay": 0.0}, r"calibration needs decay in \(0, 1\], softness >= 0 and, for rule=pilot, pilot >= 1; got 0.0, 0.0 and 2"),
    ({"decay": 1.1}, "got 1.1, 0.0 and 2"),
    ({"softness": -1.0}, "got 0.9, -1.0 and 2"),
    ({"pilot": -1}, "got 0.9, 0.0 and -1"),
    ({"rule": "pilot", "pilot": 0}, "got 0.9, 0.0 and 0"),
])
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        calibration(**change)


def test_a_typo_within_a_config_is_answered_with_the_legal_keys():
    node = {"name": "reward_quantile", "control": "none", "seed": 0, "calibration": PLAIN}
    assert build.make("mask_source", node).calibration == calibration()
    with pytest.raises(build.ConfigError, match="mask_source.calibration.quantile is not a setting; mask_source.calibration.share is "
                                                "missing. mask_source.calibration has rule, threshold, share"):
        build.make("mask_source", node | {"calibration": {"quantile" if key == "share" else key: v for key, v in PLAIN.items()}})
    with pytest.raises(build.ConfigError, match="at most 1 together; got 2.0"):
        build.make("mask_source", node | {"calibration": PLAIN | {"share": 2.0}})
