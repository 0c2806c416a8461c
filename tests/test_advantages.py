"""Claims about advantages: the baseline is the value that is silently given to a flagged rollout (graft.md §1.4, T17-T22)."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_routing.advantages import Balanced, DrGrpo, Grpo, Penalty, Weighted

F64 = torch.float64
R = torch.tensor([[3.5, 0.5, 3.5, 0.5, 0.25, 3.5], [0.0, 1.0, 0.25, 1.25, 1.0, 0.0]], dtype=F64)
FLAGS = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=F64)  # four are unflagged, so their mean is exact
SOFT = torch.tensor([[0.75, 0.0, 0.5, 0.0, 0.25, 0.0], [0.0, 0.1, 0.9, 1.0, 0.0, 0.3]], dtype=F64)
NONE, ALL = Balanced("none", 1e-4), Balanced("all", 1e-4)
EVERY = [DrGrpo(), Grpo(1e-6), NONE, ALL, Weighted("none", 1e-4), Weighted("all", 1e-4), Penalty(1.0, "progressive", 0.5, "none")]


def nothing(rewards):
    return torch.zeros_like(rewards)


def test_t_h3_advantages_on_the_benchmarks_golden_values():
    """baselines.md section 0: k successes among 16 with rewards {0.5, 3.5}; without flags `balanced` is Dr.GRPO."""
    golden = {1: (3.750, 2.812), 2: (2.562, 2.625), 4: (1.677, 2.250), 8: (0.968, 1.500), 12: (0.559, 0.750), 15: (0.250, 0.188)}
    for successes, (standard, mean_only) in golden.items():
        rewards = torch.full((1, 16), 0.5, dtype=F64)
        rewards[0, :successes] = 3.5
        clean = nothing(rewards)
        assert float(Grpo(1e-6)(rewards, clean, 1 - clean)[0, 0]) == pytest.approx(standard, abs=6e-4)
        assert float(DrGrpo()(rewards, clean, 1 - clean)[0, 0]) == pytest.approx(mean_only, abs=6e-4)
        assert torch.equal(NONE(rewards, clean, 1 - clean), DrGrpo()(rewards, clean, 1 - clean))
        assert torch.equal(ALL(rewards, clean, 1 - clean), Grpo(1e-4)(rewards, clean, 1 - clean))


@pytest.mark.parametrize(("hacks", "expected"), [(1, -0.26), (4, -0.58), (8, -1.00)])
def test_the_mean_over_all_drains_good_rollouts_and_the_balanced_baseline_does_not(hacks, expected):
    """graft.md §1.4: the mean advantage of good rollouts is -sqrt(p / (1 - p)) for K hacks among G = 16, in units of sigma."""
    rewards = torch.zeros(1, 16, dtype=F64)
    rewards[0, :hacks] = 1.0
    flags = rewards.clone()
    sigma = math.sqrt(hacks / 16 * (1 - hacks / 16))  # of the population; torch's own is the sample's
    good = DrGrpo()(rewards, flags, 1 - flags)[0, hacks:] / sigma
    assert float(good.mean()) == pytest.approx(-math.sqrt(hacks / (16 - hacks)), rel=1e-12)
    assert round(float(good.mean()), 2) == expected
    assert float(Grpo(0.0)(rewards, flags, 1 - flags)[0, -1]) * math.sqrt(16 / 15) == pytest.approx(float(good[0]), rel=1e-12)
    for balanced in (NONE, ALL):
        assert not balanced(rewards, flags, 1 - flags)[0, hacks:].any()
        assert (balanced(rewards, flags, 1 - flags)[0, :hacks] > 0).all()  # what the quarantine learns from


def test_t17_filtering_with_a_baseline_is_relabelling_to_it():
    """(1 - f)(R - b) = R' - b with R' = R but b where flagged, for any b; with b = mu_good that is Dr.GRPO on R'."""
    kept = 1 - FLAGS
    for name, advantage in {"all": DrGrpo(), "good": NONE}.items():
        values = advantage(R, FLAGS, kept)
        baseline = (R - values)[:, :1]
        relabelled = torch.where(FLAGS > 0, baseline, R)
        assert torch.equal(kept * values, relabelled - baseline), name
    good = (kept * R).sum(1, keepdim=True) / 4
    relabelled = torch.where(FLAGS > 0, good, R)
    assert torch.allclose(kept * NONE(R, FLAGS, kept), DrGrpo()(relabelled, FLAGS, kept), rtol=0, atol=1e-15)
    assert not torch.allclose(kept * DrGrpo()(R, FLAGS, kept), kept * NONE(R, FLAGS, kept), atol=0.1)  # b = mu_all is another policy


@pytest.mark.parametrize("scale", ["none", "all"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_t18_the_deployed_block_sees_a_zero_mean(scale, strength):
    """sum w_D a_m = 0 in every group, for every lambda and soft flags too; the balanced one does so at lambda = 1 only."""
    for flags in (FLAGS, SOFT):
        weights = 1 - strength * flags
        routed = Weighted(scale, 1e-4)(R, flags, weights)
        assert (weights * routed).sum(1).abs().max() < 1e-14
        balanced = (weights * Balanced(scale, 1e-4)(R, flags, weights)).sum(1).abs().max()
        assert (balanced < 1e-14) == (strength == 1.0)


@pytest.mark.parametrize("scale", ["none", "all"])
def test_t19_both_streams_agree_at_full_strength_and_where_nothing_is_left(scale):
    weighted = Weighted(scale, 1e-4)
    assert weighted.two_streams and not Balanced(scale, 1e-4).two_streams
    for flags in (FLAGS, SOFT):
        assert torch.equal(weighted(R, flags, 1 - flags), weighted.natural(R, flags))
        assert torch.equal(weighted.natural(R, flags), Balanced(scale, 1e-4)(R, flags, 1 - flags))
        assert not torch.allclose(weighted(R, flags, 1 - 0.5 * flags), weighted.natural(R, flags))
    ones = torch.ones_like(R)
    assert torch.equal(weighted(R, ones, 0 * ones), weighted.natural(R, ones))  # all flagged: the one fallback


@pytest.mark.parametrize("advantage", EVERY, ids=repr)
def test_t20_shifting_all_rewards_changes_nothing(advantage):
    values = advantage(R, SOFT, 1 - SOFT)
    assert torch.allclose(advantage(R + 7.0, SOFT, 1 - SOFT), values, rtol=0, atol=1e-13)
    assert values.abs().max() > 0.1


def test_t20_the_scale_divides_out_up_to_its_floor():
    for small in (Balanced("all", 1e-9), Weighted("all", 1e-9), Grpo(1e-9)):
        assert torch.allclose(small(5 * R, SOFT, 1 - SOFT), small(R, SOFT, 1 - SOFT), rtol=1e-7)
    assert torch.allclose(NONE(5 * R, SOFT, 1 - SOFT), 5 * NONE(R, SOFT, 1 - SOFT), rtol=1e-13)


@pytest.mark.parametrize("advantage", EVERY, ids=repr)
def test_t21_a_group_without_variance_has_no_advantage(advantage):
    """Also where the mean is not exact in binary, and whatever is flagged: rounding must not become a gradient."""
    flat = torch.tensor([[0.1] * 6, [1.25] * 6], dtype=F64)
    values = advantage(flat, nothing(flat), 1 - nothing(flat))
    assert values.abs().max() < 1e-9
    if advantage.flat_is_zero:
        for flags in (FLAGS, SOFT, torch.ones_like(flat)):
            assert advantage(flat, flags, 1 - flags).abs().max() < 1e-9
    else:
        assert advantage(flat, FLAGS, 1 - FLAGS).abs().max() > 0.5  # a penalty sees flags where rewards are equal


@pytest.mark.parametrize("advantage", [one for one in EVERY if not isinstance(one, Grpo)], ids=repr)
def test_t21_a_group_of_one_has_no_advantage(advantage):
    alone = torch.tensor([[1.0], [0.0]], dtype=F64)
    for flags in (nothing(alone), torch.ones_like(alone)):
        assert not advantage(alone, flags, 1 - flags).any()


def test_t22_the_one_fallback_is_the_mean_over_all():
    ones, mixed = torch.ones_like(R), torch.cat([torch.ones_like(R[:1]), FLAGS[1:]])
    for scale, plain in (("none", DrGrpo()), ("all", Grpo(1e-4))):
        for advantage in (Balanced(scale, 1e-4), Weighted(scale, 1e-4)):
            assert torch.allclose(advantage(R, ones, 0 * ones), plain(R, ones, 0 * ones), rtol=0, atol=1e-15)
            beside = advantage(R, mixed, 1 - mixed)  # a group that needs it does not change its neighbour
            assert torch.equal(beside[1], advantage(R, FLAGS, 1 - FLAGS)[1])
            assert torch.allclose(beside[0], plain(R, ones, 0 * ones)[0], rtol=0, atol=1e-15)


def test_a_penalty_is_taken_before_the_mean():
    """R - P p, then Dr.GRPO: the unflagged gain what the flagged lose."""
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=F64)
    flags = torch.tensor([[1.0, 0.0, 0.0, 0.5]], dtype=F64)
    assert Penalty(2.0, "progressive", 0.5, "none")(rewards, flags, 1 - flags).tolist() == [[-0.75, 1.25, 0.25, -0.75]]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Penalty(0.0, "threshold", 0.5, "none"), r"advantage.penalty must be positive; got 0.0. Use advantage=dr_grpo for none"),
    (lambda: Balanced("good", 0.1), "advantage.scale must be none or all; got 'good'"),
    (lambda: Weighted("good", 0.1), "advantage.scale must be none or all; got 'good'"),
])
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
