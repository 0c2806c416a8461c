"""Claims about the baselines' advantages: golden values and identities of baselines.md, under their numbers.

T-A: penalty and screening (Wong, Engels & Nanda). T-B: advantage modification (Wu & Tang). T-H: Dr.GRPO. MO-GRPO: section I.
"""

from __future__ import annotations

import pytest
import torch

from grpo_routing import build
from grpo_routing.advantages import DrGrpo, Grpo, Modification, MoGrpo, Penalty, Screening
from grpo_routing.reproductions import baseline_bandit

F64 = torch.float64
S, R = torch.tensor([[0.0, 1, 2, 3]], dtype=F64), torch.tensor([[3.5, 0.5, 3.5, 3.5]], dtype=F64)
NO = torch.zeros_like(R)


def modified(form="multiplicative", alpha=2.0, scores=S, rewards=R, scale="sample"):
    return Modification(form, alpha, 0.1, scale, 0.0)(rewards, NO, 1 - NO, scores)


def screening(scale="none", floor=0.0, label="loose", denominator="batch"):
    return Screening(scale, floor, label, denominator)


@pytest.mark.parametrize(("dropped", "expected"), [
    ([0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]), ([1, 0, 0, 0], [0, 0, 0, 0]), ([0, 1, 1, 1], [0, 0, 0, 0]), ([1, 1, 1, 1], [0, 0, 0, 0])])
def test_t_a3_screening_takes_its_statistics_from_those_that_are_left(dropped, expected):
    rewards = torch.tensor([[3.5, 0.5, 0.5, 0.5]], dtype=F64)
    values = screening("sample", 0.0)(rewards, torch.tensor([dropped], dtype=F64), 1 - NO)
    assert values.tolist()[0] == pytest.approx(expected)


def test_screened_rollouts_do_not_move_the_mean_of_the_others():
    rewards, flags = torch.tensor([[9.0, 1.0, 2.0, 3.0]], dtype=F64), torch.tensor([[1.0, 0, 0, 0]], dtype=F64)
    assert screening("none", 0.0)(rewards, flags, 1 - flags).tolist() == [[0.0, -1.0, 0.0, 1.0]]
    nothing = torch.zeros_like(flags)
    assert torch.equal(screening("sample", 1e-6)(rewards, nothing, 1 - nothing), Grpo(1e-6)(rewards, nothing, 1 - nothing))


def test_the_strict_label_screens_flagged_rollouts_that_were_paid():
    rewards, flags = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=F64), torch.tensor([[1.0, 1, 0, 0]], dtype=F64)
    terms = torch.stack([torch.ones_like(rewards), rewards])  # paid where the reward says so
    assert screening()(rewards, flags, 1 - flags, terms).tolist() == [[0.0, 0.0, 0.5, -0.5]]
    strict = screening(label="strict")(rewards, flags, 1 - flags, terms)
    assert strict.tolist()[0] == pytest.approx([0.0, -1 / 3, 2 / 3, -1 / 3])


def test_the_denominator_of_those_that_are_kept_makes_up_for_those_that_left():
    rewards, flags = torch.tensor([[1.0, 0, 1, 0], [1.0, 0, 0, 0]], dtype=F64), torch.tensor([[1.0, 1, 0, 0], [0.0, 0, 0, 0]], dtype=F64)
    batch, kept = (screening(denominator=name)(rewards, flags, 1 - flags) for name in ("batch", "kept"))
    assert torch.allclose(kept, batch * 8 / 6, rtol=0, atol=1e-12)
    everyone = torch.ones_like(flags)
    assert screening(denominator="kept")(rewards, everyone, 1 - everyone).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("form", ["threshold", "progressive"])
def test_t_a5_a_penalty_on_everyone_or_no_one_changes_no_advantage(form):
    penalty = Penalty(3.0, form, 0.5, "sample")
    for flags in (NO, 1 - NO):
        assert torch.allclose(penalty(R, flags, 1 - NO), Grpo(1e-6)(R, NO, 1 - NO), rtol=0, atol=1e-12)


def test_the_forms_of_the_penalty():
    p = torch.tensor([[0.0, 0.25, 0.5, 1.0]], dtype=F64)
    assert Penalty(1.0, "threshold", 0.5, "none").charge(p).tolist() == [[0, 0, 1, 1]]
    assert Penalty(1.0, "progressive", 0.5, "none").charge(p).tolist() == p.tolist()
    assert Penalty(1.0, "threshold_progressive", 0.5, "none").charge(p).tolist() == [[0.0, 0.25, 0.5, 1.0]]  # below the threshold too


@pytest.mark.parametrize(("form", "expected"), [
    ("multiplicative", [1.3485, 0.0862, -0.4482, -0.9865]), ("additive", [1.1454, -0.9442, 0.5224, -0.7236])])
def test_t_b1_goldens(form, expected):
    assert modified(form).tolist()[0] == pytest.approx(expected, abs=6e-5)
    assert modified(form, scale="none").sum().abs() < 1e-12


def test_t_b2_at_alpha_two_the_factor_is_a_sign_flip():
    """1 - 2 sigmoid(z) = -tanh(z / 2) above the mean, 1 below it."""
    paid = modified(scale="none", rewards=torch.ones_like(R)) + 1  # advantage + mean of R', up to that mean
    z = (S - 1.5) / S.std(correction=0)
    factor = torch.where(z > 0, -torch.tanh(z / 2), 1.0)
    assert torch.allclose(paid - paid.mean(), factor - factor.mean(), atol=1e-12)


def test_t_b3_a_score_of_the_prompt_alone_changes_nothing():
    for form in ("additive", "multiplicative"):
        assert torch.equal(modified(form, scores=torch.full_like(S, 7.3)), Grpo(0.0)(R, NO, 1 - NO))


def test_t_b4_the_floor_bounds_how_far_small_differences_are_blown_up():
    small = torch.tensor([[0.0, 0.01, 0.02, 0.03]], dtype=F64)
    values = modified("additive", alpha=1.0, scores=small, rewards=torch.zeros_like(R), scale="none")
    assert torch.allclose(values - values.max(), -torch.tensor([[0, 0, 0.05, 0.15]], dtype=F64), atol=1e-12)


def test_t_b5_without_strength_it_is_vanilla_bit_for_bit():
    for form in ("additive", "multiplicative"):
        assert torch.equal(modified(form, alpha=0.0), Grpo(0.0)(R, NO, 1 - NO))
        assert torch.equal(modified(form, alpha=0.0, scale="none"), DrGrpo()(R, NO, 1 - NO))


def test_t_b6_penalising_after_the_normalisation_is_another_method():
    z = (S - 1.5) / S.std(correction=0)
    after = Grpo(0.0)(R, NO, 1 - NO) - 2.0 * z.clamp_min(0)
    assert not torch.allclose(modified("additive"), after, atol=0.1)


def test_in_a_flat_group_the_strength_divides_out():
    """baselines.md B6.4: a group whose rewards are equal gets advantages from its scores alone, the same at any alpha."""
    flat = torch.full_like(R, 3.5)
    for form in ("additive", "multiplicative"):
        one, two = (modified(form, alpha=alpha, rewards=flat) for alpha in (0.5, 2.0))
        assert torch.allclose(one, two, atol=1e-12) and one.abs().max() > 0.5
    assert not Modification.flat_is_zero


def test_a_rollout_without_score_is_neither_punished_nor_counted():
    scores = torch.tensor([[0.0, 1.0, 2.0, torch.nan]], dtype=F64)
    values = modified("additive", scores=scores, scale="none", rewards=torch.zeros_like(R))
    three = modified("additive", scores=scores[:, :3], scale="none", rewards=torch.zeros(1, 3, dtype=F64))
    assert values[0, 3] == values[0, 0] == values[0, 1]  # as one at the mean or below
    assert values[0, 2] - values[0, 0] == pytest.approx(float(three[0, 2] - three[0, 0]))


def test_mo_grpo_on_the_papers_worked_example():
    """baselines.md I: its printed values are off; these are recomputed, population std."""
    terms = torch.tensor([[[0.1, 0.5, 0.9]], [[0.15, 0.13, 0.05]]], dtype=F64)
    rewards = terms.sum(0)
    values = MoGrpo(1e-6)(rewards, rewards * 0, rewards * 0 + 1, terms)
    assert values.tolist()[0] == pytest.approx([-0.299, 0.463, -0.164], abs=5e-4)
    population = Grpo(0.0)(rewards, rewards * 0, rewards * 0 + 1) * (3 / 2) ** 0.5
    assert population.tolist()[0] == pytest.approx([-1.258, 0.070, 1.188], abs=6e-4)


def test_mo_grpo_ignores_the_scale_of_a_term_and_a_term_that_is_flat():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2, 3, 5, generator=generator, dtype=F64)
    rewards = terms.sum(0)
    values = MoGrpo(1e-9)(rewards, rewards * 0, rewards * 0 + 1, terms)
    scaled = terms * torch.tensor([3.0, 0.1], dtype=F64)[:, None, None] + 4
    assert torch.allclose(MoGrpo(1e-9)(rewards, rewards * 0, rewards * 0 + 1, scaled), values, atol=1e-9)
    flat = torch.stack([terms[0], torch.full_like(terms[0], 0.1)])
    assert torch.allclose(MoGrpo(1e-9)(rewards, rewards * 0, rewards * 0 + 1, flat), MoGrpo(1e-9)(rewards, rewards, rewards, terms[:1]))


def test_t_h4_the_estimators_answer_to_an_affine_change_of_reward():
    assert torch.allclose(Grpo(0.0)(3 * R + 1, NO, 1 - NO), Grpo(0.0)(R, NO, 1 - NO), atol=1e-12)
    assert torch.allclose(DrGrpo()(3 * R + 1, NO, 1 - NO), 3 * DrGrpo()(R, NO, 1 - NO), atol=1e-12)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: screening("all"), "advantage.scale must be none or sample; got 'all'"),
    (lambda: screening(label="lax"), "advantage.label must be loose or strict; got 'lax'"),
    (lambda: screening(denominator="none"), "advantage.denominator must be batch or kept; got 'none'"),
    (lambda: Modification("square", 1.0, 0.1, "none", 0.0), "advantage.form must be additive or multiplicative"),
    (lambda: Modification("additive", -1.0, 0.1, "none", 0.0), "advantage.alpha must be at least 0"),
    (lambda: MoGrpo(0.0), "advantage.floor must be positive; got 0.0"),
    (lambda: Penalty(1.0, "square", 0.5, "none"), "advantage.form must be one of threshold, progressive"),
    (lambda: Penalty(1.0, "threshold", 1.0, "none"), r"advantage.threshold must lie in \[0, 1\); got 1.0"),
])
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_modification_needs_scores(config):
    build.plan(config("arm=modification"))
    with pytest.raises(build.ConfigError, match="advantage=modification reads scores; mask_source=none gives none"):
        build.plan(config("arm=modification", "mask_source=none"))


def ends(rule, steps, accuracy=1.0, **more):
    return baseline_bandit.play(baseline_bandit.Arm(rule, steps, accuracy, **more))


STATED = [name for name, (_, sheet) in baseline_bandit.ARMS.items() if sheet is not None]


@pytest.mark.parametrize("name", [name if "400" in name else pytest.param(name, marks=pytest.mark.slow) for name in STATED])
def test_the_bandit_ends_where_the_sheet_says(name):
    """baselines.md A8 and B8: every end point. Held to .005, or to the sheet's bound; what a random score moves, to .03."""
    arm, sheet = baseline_bandit.ARMS[name]
    hack = float(baseline_bandit.play(arm).mean())
    if "true labels" in name:
        assert hack <= sheet, "the sheet gives a bound"
    else:
        assert hack == pytest.approx(sheet, abs=0.03 if "random" in name else 0.005), name


@pytest.mark.slow
def test_a_random_score_only_delays_the_hack():
    """B6.5: the same arm at 400 steps and at 1600, every seed."""
    rule = baseline_bandit.modification("multiplicative", 2.0)
    early, late = (ends(rule, steps) for steps in (400, 1600))
    assert float(early.max()) < 0.05 and float(late.min()) > 0.8


@pytest.mark.slow
def test_screening_breaks_out_where_the_penalty_holds_if_hacks_are_common_at_the_start():
    """A8 asks for a fourth action to see it; three suffice. Every seed, accuracy .9."""
    penalty, screening = (ends(rule, 1200, 0.9, hacks=0.05, seeds=4) for rule in (baseline_bandit.PENALTY, baseline_bandit.SCREEN))
    assert float(penalty.max()) < 0.02 and float(screening.min()) > 0.9


@pytest.mark.slow
def test_with_attempts_that_are_correct_the_penalty_holds_under_loose_flags_only():
    """The fourth action on the hack's logit. Under loose flags screening breaks out alone, under strict ones the penalty does so too."""
    found = {(rule, label): ends(rule, 1200, 0.9, attempts=0.04, label=label, seeds=4)
             for rule in (baseline_bandit.PENALTY, baseline_bandit.SCREEN) for label in ("strict", "loose")}
    held = found.pop((baseline_bandit.PENALTY, "loose"))
    assert float(held.max()) < 0.02 and all(float(hack.min()) > 0.6 for hack in found.values())


@pytest.mark.parametrize("more", [{}, {"hacks": 0.05}, {"attempts": 0.04, "label": "loose"}])
def test_by_true_labels_both_hold_and_screening_leaves_more(more):
    penalty, screening = (ends(rule, 400, seeds=4, **more) for rule in (baseline_bandit.PENALTY, baseline_bandit.SCREEN))
    assert 1.2 * float(penalty.max()) < float(screening.min()) and float(screening.max()) < 0.03


def test_an_attempt_is_labelled_strictly_or_loosely():
    with pytest.raises(ValueError, match="label must be strict or loose; got 'mild'"):
        baseline_bandit.Arm(baseline_bandit.PENALTY, 1, label="mild")


def test_t_b3_the_prompts_last_token_is_the_same_for_every_answer(tiny_policy):
    """So a score read there cannot tell rollouts of a group apart, which is why the paper's own text taken literally does nothing."""
    policy = tiny_policy()
    tokens = policy.batch([("add 1 to each", text) for text in ("a", "return xs", "```python\npass\n```")] + [("sum them", "a")])
    read = {position: policy.hidden_at(tokens, [1], position)[0] for position in ("prompt_last", "last", "mean")}
    for position, h in read.items():
        assert torch.allclose(h[0], h[1], atol=1e-9) == torch.allclose(h[0], h[2], atol=1e-9) == (position == "prompt_last")
    assert not torch.allclose(read["prompt_last"][0], read["prompt_last"][3], atol=1e-3)
