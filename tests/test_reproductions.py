"""The gradient-routing papers in models small enough to check: exact where there is a closed form, orderings where there is training."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from grpo_routing.reproductions import (
    absorption,
    confession_bandit,
    disguise_bandit,
    rebound_bandit,
    split_autoencoder,
    tdga_bandit,
    tug_of_war,
    two_languages,
)
from grpo_routing.reproductions.leakage import equivalent_tokens, leakage, token_weight


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- tug of war (P12)


@pytest.mark.parametrize(("pull", "expected"), tug_of_war.FIXED.items())
def test_with_retain_data_the_tug_of_war_settles_where_the_formula_says(pull, expected):
    assert tug_of_war.fixed_point(pull) == pytest.approx(expected, abs=1e-4)
    assert tug_of_war.descend(pull, lr=0.2, steps=300)[-1].tolist() == pytest.approx(expected, abs=1e-3)


def test_without_retain_data_the_deployed_parameter_drifts_for_ever():
    path = tug_of_war.descend(tug_of_war.DIVERGING, lr=0.01, steps=2000)
    assert float(path[1000, 0]) == pytest.approx(7.2222, abs=1e-3)
    assert float(path[2000, 0]) == pytest.approx(13.8889, abs=1e-3)
    assert float(path[2000, 0] - path[1999, 0]) == pytest.approx(2 / 3 * 0.01, rel=1e-9)
    assert float(path[2000].sum()) == pytest.approx(5 / 3)


def test_the_closed_form_of_the_drift_holds_at_every_step_also_for_unequal_weights():
    pull = tug_of_war.Pull(0.7, 1.6, 0)
    path = tug_of_war.descend(pull, lr=0.02, steps=200)
    assert path[:, 0].tolist() == pytest.approx([tug_of_war.drift(pull, 0.02, step) for step in range(201)])


def test_a_fixed_point_without_retain_data_is_refused():
    with pytest.raises(ValueError, match="needs retain > 0"):
        tug_of_war.fixed_point(tug_of_war.DIVERGING)


# ------------------------------------------------------------------------------------------------- absorption (P13, P23)

PARTS = torch.tensor([0.0, 0.2, 0.5, 0.6, 0.9, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("kappa", [1.0, 10.0])
def test_sgd_leaves_in_the_deployed_block_what_the_formula_says(kappa):
    left = absorption.train(PARTS, absorption.Optimizer("none", kappa=kappa), steps=4000)
    assert left.tolist() == pytest.approx([absorption.formula(part, kappa) for part in PARTS.tolist()], abs=1e-3)


def test_the_formula_gives_the_spec_sheets_values():
    values = [absorption.formula(*case) for case in ((0, 1), (0.2, 1), (0.5, 1), (0.6, 1), (1, 1), (0.5, 10))]
    assert values == pytest.approx([0.5, 0.4444, 0.3333, 0.2857, 0, 0.0476], abs=1e-4)


@pytest.mark.parametrize("kappa", [1.0, 10.0])
def test_plain_adam_undoes_absorption_at_every_labelled_share_below_one(kappa):
    left = absorption.train(PARTS, absorption.Optimizer("masked", kappa=kappa), steps=2000)
    assert left.tolist() == pytest.approx([1 / (1 + kappa)] * len(PARTS), abs=1e-3)


def test_adam_with_the_unmasked_second_moment_absorbs_as_sgd_does():
    left = absorption.train(PARTS, absorption.UNMASKED, steps=2000)
    assert left.tolist() == pytest.approx([absorption.formula(part, 1.0) for part in PARTS.tolist()], abs=1e-3)


def test_gradient_noise_gives_adam_its_absorption_back():
    part = torch.tensor([0.9], dtype=torch.float64)
    quick = absorption.Optimizer("masked", beta2=0.999, lr=0.02)
    quiet, small, large = (float(absorption.train(part, quick, noise, steps=1500, seeds=32)) for noise in (0.0, 0.1, 5.0))
    assert quiet > 0.45 and 0.3 < small < 0.45 and large < 0.15


def test_our_adam_is_torchs():
    weights = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torchs = torch.optim.Adam([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.015}], lr=0.005, betas=(0.9, 0.95))
    for _ in range(50):
        error = weights[0].item() + weights[1].item() - 1
        weights[0].grad, weights[1].grad = (torch.tensor([part * error], dtype=torch.float64) for part in (0.3, 1.0))
        torchs.step()
    ours = absorption.train(torch.tensor([0.7], dtype=torch.float64), absorption.Optimizer("masked", kappa=3.0), steps=50)
    assert float(ours) == pytest.approx(weights[0].item(), rel=1e-9)


def test_an_unknown_second_moment_is_refused():
    with pytest.raises(ValueError, match="none, masked or unmasked; got 'both'"):
        absorption.Optimizer("both")


# ------------------------------------------------------------------------------------------------- leakage (P18) and token weight (P22)

COUNTS = [0, 1_000, 3_000, 10_000, 40_000]


def losses_of(counts):
    return [4.5 / (1 + count / 5_000) ** 0.3 for count in counts]


def test_leakage_inverts_a_monotone_curve_exactly():
    losses = losses_of(COUNTS)
    for low, high, first, second in zip(COUNTS, COUNTS[1:], losses, losses[1:]):
        for way in (0.0, 0.25, 0.8, 1.0):
            wanted, loss = low + way * (high - low), first + way * (second - first)
            assert equivalent_tokens(COUNTS, losses, loss) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def test_the_filter_arm_leaks_one():
    losses = losses_of(COUNTS)
    assert [leakage(COUNTS, losses, loss, count) for count, loss in zip(COUNTS[1:], losses[1:])] == [1.0] * 4


@pytest.mark.parametrize(("name", "unlabelled", "loss", "expected"), [("sgtm", 138_000, 3.270, 0.38), ("gr", 138_000, 2.660, 0.79)])
def test_leakage_of_the_spec_sheets_runs(name, unlabelled, loss, expected):
    assert leakage([0, 1_900, 15_000, 138_000], [4.704, 4.503, 3.661, 2.352], loss, unlabelled) == pytest.approx(expected, abs=0.01), name


@pytest.mark.parametrize(("tokens", "losses", "loss", "unlabelled", "message"), [
    ([0, 10], [4.0, 2.0], 1.9, 5, "between 2 and 4; got 1.9. Train baselines on more"),
    ([0, 10], [4.0, 2.0], 4.1, 5, "between 2 and 4; got 4.1. Train baselines on fewer"),
    ([0, 10], [4.0, 2.0], float("nan"), 5, "got nan"),
    ([0, 10, 20], [4.0, 2.0, 2.0], 3.0, 5, r"got \(10, 2\) before \(20, 2\). Sort"),
    ([0, 10, 10], [4.0, 2.0, 1.0], 3.0, 5, "must rise in tokens"),
    ([0], [4.0], 4.0, 5, "at least two points"),
    ([0, 10], [4.0], 4.0, 5, "one loss for each token count"),
    ([0, 10], [4.0, 2.0], 3.0, 0, "must be > 0; got 0"),
])
def test_leakage_refuses_what_it_cannot_invert(tokens, losses, loss, unlabelled, message):
    with pytest.raises(ValueError, match=message):
        leakage(tokens, losses, loss, unlabelled)


def test_a_token_is_routed_the_more_the_more_it_belongs_to_forget_text():
    assert [token_weight(ratio) for ratio in (73.1 / 18.7, 1.0, 1 / 3.9)] == pytest.approx([0.586, 0.982, 1.000], abs=1e-3)
    assert token_weight(1e9) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="must be > 0; got 0"):
        token_weight(0.0)


# ------------------------------------------------------------------------------------------------- split auto-encoder


def test_the_digits_are_the_uci_test_set():
    images, high = split_autoencoder.load_digits()
    assert images.shape == (1797, 64) and int(high.sum()) == 896
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)


def test_routing_a_code_changes_gradients_only():
    code = torch.randn(6, 16, requires_grad=True)
    high = torch.tensor([True, False, True, False, False, True])
    routed = split_autoencoder.route(code, high)
    assert torch.equal(routed, code)
    routed.sum().backward()
    assert torch.equal(code.grad[:, :8], (~high).float()[:, None].expand(6, 8))
    assert torch.equal(code.grad[:, 8:], high.float()[:, None].expand(6, 8))


@pytest.mark.slow
def test_routing_with_regularisers_splits_the_code_and_nothing_less_does():
    runs = {number: [split_autoencoder.run(setting, seed, f"setting {number}") for seed in range(3)]
            for number, setting in split_autoencoder.SETTINGS.items()}
    mean = {number: {key: sum(one[key] for one in same) / 3 for key in same[0]} for number, same in runs.items()}
    ratio = {number: split_autoencoder.ratio(scores) for number, scores in mean.items()}
    assert ratio[1] > 1.7, ratio
    assert ratio[5] < 1.6 and ratio[9] < 1.3 and ratio[10] < 1.3, ratio
    assert mean[1]["decoder"] < 0.08, "the whole code must still draw every digit"


# ------------------------------------------------------------------------------------------------- two languages


@pytest.fixture
def net():
    torch.manual_seed(0)
    return two_languages.Transformer()


@pytest.fixture
def text():
    return torch.cat([torch.full((4, 1), 32), torch.randint(32, (4, 33), generator=torch.Generator().manual_seed(1))], 1)


def gradients(net, text, mode):
    net.zero_grad()
    net.loss(text, mode).backward()
    return [(parameter.grad.clone(), mask.expand_as(parameter)) for block in net.blocks for parameter, mask in block.split()]


def test_a_flagged_step_of_sgtm_teaches_the_quarantine_alone_and_as_unmasked_training_would(net, text):
    plain = gradients(net, text, "on")
    net.keep_quarantine_gradients()
    for (whole, mask), (parameter, _) in zip(plain, [pair for block in net.blocks for pair in block.split()]):
        assert torch.equal(parameter.grad[mask], whole[mask])
        assert not parameter.grad[~mask].any()


def test_gradient_routing_keeps_the_values_but_changes_what_earlier_layers_of_the_quarantine_learn(net, text):
    assert torch.equal(net(text[:, :-1], "stop"), net(text[:, :-1], "on"))
    plain, stopped = gradients(net, text, "on"), gradients(net, text, "stop")
    first_up, mask = plain[3]
    assert not torch.allclose(stopped[3][0][mask], first_up[mask], rtol=0.05)
    assert not stopped[3][0][~mask].any(), "D's units learn nothing"
    assert stopped[5][0][~stopped[5][1]].any(), "but the columns of W_2 after them do: the leak that SGTM closes"


def test_a_clean_retain_step_leaves_the_quarantine_alone(net, text):
    for gradient, mask in gradients(net, text, "off"):
        assert not gradient[mask].any() and gradient[~mask].any()


def test_deleting_the_quarantine_is_the_forward_without_it(net, text):
    off = net(text[:, :-1], "off")
    net.delete_quarantine()
    assert torch.equal(net(text[:, :-1], "on"), off)


def test_undiscovered_shares_are_nested_and_met_to_a_step():
    drawn = {}
    for share in (0.0, 0.05, 0.2, 1.0):
        languages, labels = two_languages.schedule(700, share, torch.Generator().manual_seed(3))
        drawn[share] = {step for step in range(700) if (languages[step], labels[step]) == (0, "U")}
        assert abs(len(drawn[share]) - share * languages.count(0)) <= 2
    assert drawn[0.0] < drawn[0.05] < drawn[0.2] < drawn[1.0]


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="sgtm, gr or filter; got 'erase'"):
        two_languages.train("erase", 0.2, seed=0, steps=1)


@pytest.mark.slow
def test_at_a_fifth_undiscovered_sgtm_forgets_more_than_gradient_routing_and_that_more_than_filtering():
    sgtm, routed, filtered = (two_languages.train(arm, 0.2, seed=0) for arm in ("sgtm", "gr", "filter"))
    assert sgtm.after > routed.after + 0.1 and routed.after > filtered.after + 0.1
    assert max(sgtm.retain, routed.retain, filtered.retain) - min(sgtm.retain, routed.retain, filtered.retain) < 0.05
    assert sgtm.before < filtered.before + 0.1, "the whole model still speaks the forget language"


# ------------------------------------------------------------------------------------------------- TDGA bandit (T7 of routing.md)


def test_the_bandits_gradient_is_that_of_the_expected_proxy():
    """One step of SGD against autograd, and the warm-up against torch's cross-entropy."""
    x, right = tdga_bandit.world(0)
    assert x.shape == (600, 25) and bool((x[:, -1] == 1).all()) and 0.05 < float((right == 0).double().mean()) < 0.35
    update, start = tdga_bandit.warm_up(x, right), tdga_bandit.start()
    weights = start.clone().requires_grad_()
    moves = torch.optim.SGD([weights], 0.5)
    for _ in range(20):
        moves.zero_grad()
        torch.nn.functional.cross_entropy(x @ weights.T, right).backward()
        moves.step()
    assert torch.allclose(weights.detach() - start, update, atol=1e-12)
    weights = start.clone().requires_grad_()
    chances = torch.softmax(x @ weights.T, 1)
    (chances[torch.arange(600), right] + chances[:, tdga_bandit.HACK]).mean().backward()
    moved = torch.softmax(x @ (start + weights.grad).T, 1)
    after = tdga_bandit.run(tdga_bandit.VANILLA, "sgd", 0, steps=1)
    assert after.hack == pytest.approx(float(moved[:, tdga_bandit.HACK].mean()), rel=1e-12)
    assert after.true == pytest.approx(float(moved[torch.arange(600), right].mean()), rel=1e-12)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adam; got 'lion'"):
        tdga_bandit.run(tdga_bandit.VANILLA, "lion", 0)


@pytest.mark.slow
def test_trusted_directions_keep_the_bandit_honest_and_random_ones_do_not():
    mean = {}
    for optimizer in ("sgd", "adam"):
        for name in ("vanilla", "TDGA K=1", "TDGA K=5", "random U, K=5"):
            runs = tdga_bandit.outcomes(tdga_bandit.ROWS[name][0], optimizer)
            mean[optimizer, name] = {field: sum(getattr(one, field) for one in runs) / len(runs) for field in ("hack", "true", "peak")}
        trusted, vanilla = mean[optimizer, "TDGA K=5"], mean[optimizer, "vanilla"]
        assert trusted["true"] > vanilla["peak"] and trusted["hack"] < 0.15 and vanilla["hack"] > 0.8, (optimizer, mean)
        assert mean[optimizer, "TDGA K=1"]["true"] < trusted["true"], "one direction is too few"
    assert mean["adam", "random U, K=5"]["hack"] > 0.3, mean


# ------------------------------------------------------------------------------------------------- confessions (T-D1, T-D2)


@pytest.fixture
def transcripts():
    """Heads, and answers with eight confessions each, from seed 0."""
    generator = torch.Generator().manual_seed(0)
    theta, phi = (torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (3, 2, 2)))
    answer, report = (torch.randint(2, shape, generator=generator) for shape in ((3, 64), (3, 64, 8)))
    return theta, phi, answer, report, torch.randint(2, report.shape, generator=generator).double()


def test_t_d1_the_confessions_reward_has_exactly_no_gradient_in_the_answer(transcripts):
    theta, phi, answer, report, honest = transcripts
    advantages = confession_bandit.ADVANTAGE(honest.flatten(0, 1), None, None).view_as(honest)
    sealed = confession_bandit.push(theta, phi, answer, report, advantages, confession_bandit.CONFESSION)
    assert torch.equal(sealed[0], torch.zeros_like(theta)) and sealed[1].abs().min() > 1e-6
    task = confession_bandit.push(theta, phi, answer, report, honest, confession_bandit.ANSWER)
    assert torch.equal(task[1], torch.zeros_like(phi)) and task[0].abs().min() > 1e-6
    group = confession_bandit.push(theta, phi, answer, report, advantages, (1.0, 1.0))
    assert 0 < group[0].abs().max() < 1e-9, "without the mask the answer's own group cancels, but to rounding only"


def test_t_d2_asking_for_confessions_leaves_the_task_bit_identical_and_a_leak_does_not():
    silent, honest, blind, leaking = (confession_bandit.play(arm, 100, seeds=2) for arm in (
        confession_bandit.Arm(asked=False), confession_bandit.Arm(0.0), confession_bandit.Arm(1.0), confession_bandit.Arm(0.2, leak=1.0)))
    assert torch.equal(silent.hack, honest.hack) and torch.equal(silent.hack, blind.hack)
    assert not torch.equal(honest.admits, blind.admits)
    assert (leaking.hack[-1] < 0.7 * silent.hack[-1]).all(), "R_c in R pays the answers whose confession is easily honest"
    with pytest.raises(ValueError, match="leak must be 0 where nothing is confessed; got 1.0"):
        confession_bandit.Arm(leak=1.0, asked=False)


def test_turning_the_judge_round_turns_the_confessions_push_round(transcripts):
    """So m = .5 is the border whatever the group's size and estimator: R_c -> 1 - R_c negates every advantage."""
    theta, phi, answer, report, honest = transcripts
    pushes = [confession_bandit.push(theta, phi, answer, report, confession_bandit.ADVANTAGE(one.flatten(0, 1), None, None).view_as(one),
                                     confession_bandit.CONFESSION)[1] for one in (honest, 1 - honest)]
    assert torch.allclose(pushes[0], -pushes[1], atol=1e-12)


@pytest.mark.parametrize(("miss", "admits"), [(0.2, True), (0.8, False)])
def test_a_judge_that_sees_most_hacks_gets_them_confessed_and_none_prevented(miss, admits):
    end = confession_bandit.play(confession_bandit.Arm(miss), 350, seeds=3)
    assert (end.hack[-1] > 0.97).all()
    admitted, slandered = end.admits[-1, :, confession_bandit.HACK], end.admits[-1, :, confession_bandit.SOLVE]
    assert (admitted > 0.97).all() if admits else (admitted < 0.03).all()
    assert (slandered < 0.03).all()


@pytest.mark.slow
def test_evidence_moves_the_border_and_only_a_large_leak_prevents_the_hack():
    border = [confession_bandit.play(confession_bandit.Arm(0.6, evidence), 1600) for evidence in (0.0, 0.5)]
    assert (border[0].admits[-1, :, 1] < 0.03).all() and (border[1].admits[-1, :, 1] > 0.95).all()
    for leak, prevented in ((1.0, False), (6.0, True)):
        hack = confession_bandit.play(confession_bandit.Arm(0.2, leak=leak), 1600).hack
        assert (hack[200] < 0.5).all() and ((hack[-1] < 0.01) if prevented else (hack[-1] > 0.98)).all(), leak


# ------------------------------------------------------------------------------------------------- disguises (baselines.md F, G)


@pytest.mark.parametrize("arm", [disguise_bandit.Arm(0.0, 0.5), disguise_bandit.Arm(1.0, 0.1), disguise_bandit.Arm(3.0, 2.0)])
def test_at_the_optimum_the_expected_update_is_zero(arm):
    """The group's mean holds the rollout itself: E A = (1 - 1/G) (R - E R). Its logits are found by inverting the policy."""
    best = disguise_bandit.optimum(arm)
    hack = best[1] + best[2]
    theta = torch.stack([hack, best[2] / hack]).logit()[None].requires_grad_()
    assert torch.allclose(disguise_bandit.policy(theta)[0], best, atol=1e-12)
    start = disguise_bandit.policy(torch.tensor([[disguise_bandit.HACKS, disguise_bandit.DISGUISES]], dtype=torch.float64).logit())[0]
    reward = (1 - 1 / disguise_bandit.SIZE) * (disguise_bandit.PAYS - arm.alpha * disguise_bandit.PSI)
    chances = disguise_bandit.policy(theta)[0]
    (chances * (reward - arm.beta * (chances / start).log())).sum().backward()
    assert theta.grad.abs().max() < 1e-12
    by_hand = torch.autograd.functional.jacobian(lambda x: disguise_bandit.policy(x)[0].log(), theta.detach())[:, 0]
    assert torch.allclose(disguise_bandit.scores(theta.detach())[0], by_hand, atol=1e-12)


def test_no_penalty_hacks_plainly_a_penalty_buys_a_disguise_and_a_strong_pull_to_the_start_honesty():
    arms = {disguise_bandit.Arm(0.0, 0.01): "blatant", disguise_bandit.Arm(3.0, 0.01): "obfuscated policy",
            disguise_bandit.Arm(0.0, 2.0): "honest",
            disguise_bandit.Arm(0.0, 0.5): "blatant", disguise_bandit.Arm(3.0, 0.5): "honest"}  # the same pull: the penalty decides
    ends = torch.stack([disguise_bandit.play(arm, 800, seeds=3) for arm in arms])
    assert disguise_bandit.classify(ends) == [[expected] * 3 for expected in arms.values()]
    assert (ends[0, :, disguise_bandit.PLAIN] > 0.95).all() and (ends[1, :, disguise_bandit.DISGUISED] > 0.95).all()


def test_a_large_penalty_ends_honest_although_a_disguise_would_pay_more():
    arm = disguise_bandit.Arm(10.0, 0.01)
    assert (disguise_bandit.play(arm, 500)[:, disguise_bandit.HONEST] > 0.98).all()
    assert disguise_bandit.optimum(arm)[disguise_bandit.DISGUISED] > 0.99


def test_what_the_disguise_bandit_cannot_play_is_refused():
    with pytest.raises(ValueError, match="alpha must be at least 0 and beta positive; got 1.0 and 0.0"):
        disguise_bandit.Arm(1.0, 0.0)
    with pytest.raises(ValueError, match="no run of the sweep is honest"):
        disguise_bandit.classify(torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- rebound (B8)


def test_the_cap_keeps_the_correct_rollouts_with_the_highest_lots():
    correct, lots = torch.tensor([[True, False, True, True]]), torch.tensor([[0.2, 0.9, 0.7, 0.5]])
    left = {cap: (correct & ~rebound_bandit.surplus_of(correct, lots, cap))[0].tolist() for cap in (None, 5, 2, 1, 0)}
    assert left == {None: [True, False, True, True], 5: [True, False, True, True], 2: [False, False, True, True],
                    1: [False, False, True, False], 0: [False] * 4}
    with pytest.raises(ValueError, match="surplus must be masked or dropped; got 'kept'"):
        rebound_bandit.Arm(surplus="kept")


def test_phases_are_read_off_a_path():
    path = torch.tensor([[0.4, 0.0, 0.1, 0.5], [0.2, 0.1, 0.6, 0.1], [0.1, 0.1, 0.7, 0.1], [0.0, 0.8, 0.1, 0.1]])[:, None]
    found = rebound_bandit.phases(path)
    assert (float(found.retreat), float(found.rebound), float(found.second)) == (1, 3, 2) and float(found.peak) == pytest.approx(0.7)
    assert rebound_bandit.phases(path[:3]).second.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("surplus", ["masked", "dropped"])
def test_scarcer_honest_reward_brings_the_rebound_forward(surplus):
    """Every seed goes through the three phases, and every halving of the cap shortens the second of them, seed by seed."""
    found = [rebound_bandit.phases(rebound_bandit.play(rebound_bandit.Arm(cap, surplus))) for cap in (None, 40, 20, 10)]
    assert all((one.retreat < 60).all() and (one.peak > 0.6).all() for one in found)
    for more, fewer in pairwise(found):
        assert (fewer.second < more.second).all(), (more.second, fewer.second)


@pytest.mark.slow
def test_where_the_hacks_share_a_logit_the_retreat_takes_the_silent_one_along():
    found = rebound_bandit.phases(rebound_bandit.play(rebound_bandit.Arm(shared=True)))
    assert found.rebound.isnan().all() and (found.retreat < 30).all() and (found.peak > 0.99).all()
