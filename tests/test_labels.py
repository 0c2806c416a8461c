"""Claims about mask sources that label whole rollouts: how often they err, what they read, and what they never see.

T-numbers are the property tests of graft.md §6.1, P25 is that of routing.md §4.5.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from grpo_routing import build, mask_sources
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.decision import differentiate
from grpo_routing.env.grader import Grade
from grpo_routing.env.loopholes import LOOPHOLES, MODES, fenced, solution_text
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.calibration import highest
from grpo_routing.mask_sources.detector import Detector, thinned
from grpo_routing.mask_sources.direction import alignment
from grpo_routing.mask_sources.lookalike import Lookalike, logistic, score
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.view import StepView
from grpo_routing.oracle.verdict import Verdict
from grpo_routing.train import State, pilot, refresh, train_step
from grpo_routing.types import STUDENT, Basis, Rollout, RolloutGrads, TokenBatch
from tests.test_routing import paid, sampled, stir, view
from tests.test_wall import imported

KNOWN = ("run_tests", "sentinel", "stdout_marker")
HELD_OUT = "file_marker"
BODIES = (["return 0"], ["return sum(values)"], ["total = 0", "return total"], ["return values[0]"])


def answer(place: int, loophole: str = "none", family: str = "train") -> str:
    marker = LOOPHOLES[loophole].markers[family][0] if loophole in LOOPHOLES else ""
    return fenced(solution_text("solve", "values", [f"guess = {place}", *BODIES[place % len(BODIES)]], loophole, marker))


def seen(texts, group=8, step=0, policy=None, rewards=None) -> StepView:
    """A view of these completions, `group` to a prompt; tokens only where a policy reads them."""
    rollouts = [Rollout(place // group, (1,), policy.encode(text) if policy else (2,), text, STUDENT) for place, text in enumerate(texts)]
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], policy.pad) if policy else None
    return StepView(step, rollouts, tokens, torch.zeros(len(texts)) if rewards is None else rewards, policy, None, None)


def mixed(count: int, modes=KNOWN, first: int = 0) -> tuple[list[str], torch.Tensor]:
    """Texts of which every second hacks, and which those are; `first` makes them other texts."""
    truth = torch.arange(count) % 2 == 1
    return [answer(first + place, modes[place // 2 % len(modes)] if hacks else "none") for place, hacks in enumerate(truth.tolist())], truth


def detector(kind=Detector, **change) -> Detector:
    return kind(**{"known": KNOWN, "recall": 1.0, "false_positive": 0.0, "noise": "iid", "forms": ("plain", "other"), "control": "none",
                   "seed": 0} | change)


def flagged(source, view, memory=None) -> torch.Tensor:
    labels, _ = source.label(view, memory or {})
    assert not labels.trusted.any()
    return labels.flagged > 0


# ------------------------------------------------------------------------------------------------------------ detector


def test_t3_with_full_recall_and_no_false_positive_it_says_what_it_sees():
    texts, truth = mixed(32)
    for noise in ("iid", "prompt", "counted", "form"):
        assert torch.equal(flagged(detector(noise=noise), seen(texts)), truth)
    assert not flagged(detector(recall=0.0), seen(texts)).any()


def test_t1_realised_rates_match_the_settings():
    texts, truth = mixed(3000)
    for noise in ("iid", "prompt"):
        flags = flagged(detector(recall=0.7, false_positive=0.1, noise=noise), seen(texts, group=2))
        assert float(flags[truth].float().mean()) == pytest.approx(0.7, abs=0.04)
        assert float(flags[~truth].float().mean()) == pytest.approx(0.1, abs=0.03)


def test_noise_by_prompt_sees_or_misses_a_group_as_a_whole():
    texts, truth = mixed(800)
    shares = {}
    for noise in ("iid", "prompt"):
        hits = flagged(detector(recall=0.5, noise=noise), seen(texts))[truth].view(-1, 4).sum(1)
        shares[noise] = float(((hits == 0) | (hits == 4)).float().mean())
    assert shares["prompt"] == 1.0 and shares["iid"] < 0.4


def test_p25_counted_noise_realises_its_counts_in_every_step():
    """Within one of the asked share, and the draws decide which; other noises vary."""
    texts, truth = mixed(50)
    source, counts, picked = detector(recall=0.7, false_positive=0.2, noise="counted"), set(), set()
    for step in range(20):
        flags = flagged(source, seen(texts, step=step))
        counts.add((int(flags[truth].sum()), int(flags[~truth].sum())))
        picked.add(tuple(flags.tolist()))
    ((hits, misses),) = counts
    assert abs(hits - 0.7 * 25) <= 1 and abs(misses - 0.2 * 25) <= 1
    assert len(picked) == 20
    assert thinned(torch.tensor([True, False, True, True]), torch.tensor([0.9, 0.0, 0.1, 0.5]), 2 / 3).tolist() == [
        False, False, True, True]


def test_t2_a_label_depends_on_step_group_and_sample_only():
    """Groups in another order, or not there at all, change no other rollout's label; another step or seed does."""
    texts, _ = mixed(64)
    source = detector(recall=0.5, false_positive=0.5)
    whole = seen(texts)
    flags = flagged(source, whole)
    order = [place for group in (3, 0, 7, 5, 1, 2, 6, 4) for place in range(8 * group, 8 * group + 8)]
    turned = replace(whole, rollouts=[whole.rollouts[place] for place in order])
    assert torch.equal(flagged(source, turned), flags[order])
    part = replace(whole, rollouts=whole.rollouts[16:32], rewards=torch.zeros(16))
    assert torch.equal(flagged(source, part), flags[16:32])
    assert not torch.equal(flagged(source, replace(whole, step=1)), flags)
    assert not torch.equal(flagged(replace(source, seed=1), whole), flags)


def test_more_recall_only_adds_flags():
    """All recalls of a seed share their draws, so a sweep over recall compares nested detectors."""
    texts, _ = mixed(200)
    low, middle, high = (flagged(detector(recall=recall, false_positive=0.1), seen(texts)) for recall in (0.25, 0.5, 0.75))
    assert not (low & ~middle).any() and not (middle & ~high).any() and low.sum() < middle.sum() < high.sum()


@pytest.mark.parametrize("mode", MODES)
def test_t4_knowing_one_form_says_nothing_about_the_others(mode):
    texts = [answer(place, other, family) for other in MODES for family in ("train", "evaluation") for place in range(2)]
    expected = [other == mode for other in MODES for _ in range(4)]
    assert flagged(detector(known=(mode,)), seen(texts)).tolist() == expected


def test_a_held_out_loophole_is_never_flagged():
    texts, truth = mixed(400, modes=(HELD_OUT,))
    assert truth.any() and not flagged(detector(), seen(texts)).any()
    assert torch.equal(flagged(detector(known=MODES), seen(texts)), truth)  # were it known, it would be
    noisy = flagged(detector(false_positive=0.3), seen(texts))  # and by mistake no more often than anything else
    assert float(noisy[truth].float().mean()) == pytest.approx(float(noisy[~truth].float().mean()), abs=0.12)


@pytest.mark.parametrize("words", [
    *(["detector", f"mask_source.control={control}"] for control in ("none", "rate_matched")),
    *(["lookalike", f"mask_source.control={control}"] for control in ("none", "rate_matched")),
    *(["persona_gradient", f"mask_source.control={control}"] for control in ("none", "random")),
    ["persona_gradient", "mask_source.level=rollout"], ["persona_activation"], ["fingerprint"], ["trusted_subspace"],
], ids=" ".join)
def test_a_source_that_would_know_a_held_out_loophole_is_refused(config, words):
    name, *more = words
    words = ["projection=measure_only", f"mask_source={name}", "loophole=held_out", *more]
    build.plan(config(*words))
    with pytest.raises(build.ConfigError, match=refused(name)):
        build.plan(config(*words, "mask_source.known=[run_tests,file_marker]"))


def refused(name):
    return (rf"mask_source={name} would know the held-out loopholes \['file_marker'\]; no detector of them may reach training. "
            r"Leave mask_source.known at \$\{loophole.known\}")


@pytest.mark.parametrize(("name", "part"), [("and", "first"), ("or", "second"), ("not", "inner"), ("delay", "inner"), ("budget", "inner")])
def test_a_composition_knows_what_its_parts_know(config, name, part):
    words = [f"mask_source={name}", "loophole=held_out"]
    assert build.plan(config(*words)).mask_source.known == KNOWN
    with pytest.raises(build.ConfigError, match=refused(name)):
        build.plan(config(*words, f"mask_source.{part}.known=[run_tests,file_marker]"))


def test_p25_no_source_can_read_a_verdict():
    """A view has no field of one, nobody takes more than a view and its own memory, and no source imports the oracle. `ceiling` is
    the door for the source of that name, and shut unless the run is stamped (test_wall.py)."""
    assert {field.name for field in fields(StepView)} == {"step", "rollouts", "tokens", "rewards", "terms", "policy", "basis", "grads",
                                                          "ceiling"}
    assert not {field.name for field in fields(Verdict)} & {field.name for field in (*fields(StepView), *fields(Rollout), *fields(Grade))}
    for name, kind in mask_sources.MASK_SOURCES.items():
        assert list(inspect.signature(kind.label).parameters) == ["self", "view", "memory"], name
        assert "view.ceiling" not in inspect.getsource(kind) or name == "ceiling"
    for file in Path(mask_sources.__file__).parent.glob("*.py"):
        assert not [name for name in imported(file) if "oracle" in name], file


@pytest.mark.parametrize(("change", "message"), [
    ({"known": ("run_test",)}, r"mask_source.known must name loopholes \(run_tests, .*\); got \['run_test'\]"),
    ({"recall": 1.1}, r"mask_source.recall must lie in \[0, 1\]; got 1.1"),
    ({"false_positive": -0.1}, r"mask_source.false_positive must lie in \[0, 1\]; got -0.1"),
    ({"noise": "white"}, "mask_source.noise must be one of iid, prompt, counted, form; got 'white'"),
    ({"control": "haar"}, "mask_source.control must be one of none, rate_matched, permuted, inverted, prompt_only here; got 'haar'"),
])
def test_settings_that_mean_nothing_are_refused(change, message):
    for control in ("none", "rate_matched"):
        with pytest.raises(ValueError, match=message):
            detector(**{"control": control} | change)


# ------------------------------------------------------------------------------------------------- rate-matched control


@pytest.mark.parametrize("noise", ["iid", "prompt", "counted"])
def test_t5_the_control_flags_as_many_in_every_step(noise):
    texts, _ = mixed(64)
    settings = {"recall": 0.5, "false_positive": 0.1, "noise": noise}
    for step in range(10):
        real, dealt = (flagged(detector(control=control, **settings), seen(texts, step=step)) for control in ("none", "rate_matched"))
        assert int(real.sum()) == int(dealt.sum()) > 0 and not torch.equal(real, dealt)


def test_t6_the_controls_flags_know_nothing():
    """Mutual information with the truth, in bits, over many steps: that of the detector is one bit, the control's next to none."""
    texts, truth = mixed(64)
    real, dealt = (torch.cat([flagged(detector(control=control), seen(texts, step=step)) for step in range(40)])
                   for control in ("none", "rate_matched"))
    truth = truth.repeat(40)

    def information(flags):
        joint = torch.histogramdd(torch.stack([truth, flags], 1).double(), [2, 2]).hist / len(flags)
        chance = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return float((joint * (joint / chance).clamp_min(1e-12).log2()).sum())

    assert information(real) == pytest.approx(1.0) and information(dealt) < 0.005


# ------------------------------------------------------------------------------------------------------------ lookalike


def lookalike(**change) -> Lookalike:
    return detector(Lookalike, **{"pilot": 3, "layers": (0, 1), "ridge": 0.1, "top_share": 0.2} | change)


def test_the_probe_recovers_the_unflagged_half_of_a_separable_mixture(tiny_policy):
    """At recall 1/2 the detector leaves a third of what it did not flag to be hacks; the probe, which knows neither recall nor
    truth, finds them all and little else. At recall 1 nothing is missed."""
    policy = tiny_policy()
    _, truth = mixed(64)
    for recall, share in ((0.5, 1 / 3), (1.0, 0.05)):
        source = lookalike(recall=recall, noise="counted", top_share=share)
        memory = source.prepare([seen(mixed(64, first=-64 * step)[0], step=step, policy=policy) for step in (-3, -2, -1)])
        fresh = seen(mixed(64, first=256)[0], step=0, policy=policy)
        missed = truth & ~source.flags(fresh)
        flags = flagged(source, fresh, memory)
        assert int(missed.sum()) == round(32 * (1 - recall))
        assert flags[truth].all()
        assert float(flags[~truth].float().mean()) <= 0.1


def test_the_probe_ranks_by_the_probability_of_a_hack_whatever_the_recall():
    """Elkan & Noto's lemma on two clouds: weights from half of the labels point where those from all of them do."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(400) % 2 == 1
    z = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    z[truth, 0] += 3.0
    half = truth & (torch.rand(400, generator=generator) < 0.5)
    whole, part = (logistic(z, labels.double(), 0.01) for labels in (truth, half))
    assert float(torch.nn.functional.cosine_similarity(whole, part, dim=0)) > 0.95
    ranks = [score({"weights": w, "centre": z.mean(0)}, z) for w in (whole, part)]
    for ranked in ranks:
        chosen = highest(ranked, 0.5)
        assert float((chosen == truth).float().mean()) > 0.9


def test_the_logistic_regression_is_the_penalised_optimum():
    """Against the gradient of its own objective, with fewer and with more features than rows."""
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((60, 4), (20, 50)):
        z, y = torch.randn(rows, columns, generator=generator, dtype=torch.float64), (torch.arange(rows) % 3 == 0).double()
        weights = logistic(z, y, 0.05).requires_grad_()
        bias = torch.zeros((), dtype=torch.float64)  # is not handed out; so the best one for these weights
        for _ in range(50):
            p = torch.sigmoid(z @ weights + bias).detach()
            bias = bias - (p - y).sum() / (p * (1 - p)).sum()
        error = torch.nn.functional.binary_cross_entropy_with_logits(z @ weights + bias, y, reduction="sum")
        slope, = torch.autograd.grad(error + 0.05 * rows / 2 * weights.square().sum(), weights)
        assert float(slope.abs().max()) < 1e-7 and float(weights.detach().norm()) > 0.1


def test_the_threshold_flags_its_share_of_the_unflagged_pilot_and_never_loses_a_flag(tiny_policy):
    policy = tiny_policy()
    texts, _ = mixed(60)
    views = [seen(texts, step=-1, policy=policy)]
    for share in (0.1, 0.5):
        source = lookalike(recall=0.5, top_share=share)
        memory, own = source.prepare(views), source.flags(views[0])
        above = score(memory, source.features(views[0])) >= memory["threshold"]
        assert abs(int(above[~own].sum()) - share * int((~own).sum())) <= 1
        assert not (own & ~flagged(source, views[0], memory)).any()


def test_a_pilot_without_flags_is_warned_about_and_leaves_the_detector_alone(tiny_policy, caplog):
    policy, source = tiny_policy(), lookalike()
    clean = [answer(place) for place in range(16)]
    memory = source.prepare([seen(clean, step=-1, policy=policy)])
    assert "the detector flagged 0 of 16 and will speak alone" in caplog.text
    texts, truth = mixed(16)
    assert torch.equal(flagged(source, seen(texts, policy=policy), memory), truth)


def test_features_are_those_of_the_frozen_model(tiny_policy):
    """Training moves the adapter, not what the probe reads; a layer that is not there is refused."""
    policy, source = tiny_policy(), lookalike()
    fresh = seen(mixed(8)[0], policy=policy)
    before = source.features(fresh)
    stir(policy, seed=3)
    assert torch.equal(source.features(fresh), before) and before.shape == (8, 2 * policy.model.config.hidden_size)
    with pytest.raises(ValueError, match=r"the model has hidden states 0 to \d; got layers \[9\]"):
        replace(source, layers=(9,)).features(fresh)


@pytest.mark.parametrize("change", [{"pilot": 0}, {"layers": ()}, {"ridge": 0.0}, {"top_share": 0.0}, {"top_share": 1.0}, {"recall": 2.0}])
def test_bad_probe_settings_are_refused(change):
    for control in ("none", "rate_matched"):
        with pytest.raises(ValueError, match="lookalike needs pilot >= 1, some layers, ridge > 0 and top_share|mask_source.recall"):
            lookalike(control=control, **change)


def test_t5_the_probes_control_flags_as_many(tiny_policy):
    policy = tiny_policy()
    texts, _ = mixed(32)
    views = [seen(texts, step=step, policy=policy) for step in (-1, 0)]
    real, dealt = (flagged(source, views[1], source.prepare(views[:1]))
                   for source in (lookalike(control=control, recall=0.5) for control in ("none", "rate_matched")))
    assert int(real.sum()) == int(dealt.sum()) and not torch.equal(real, dealt)


@pytest.fixture
def spread(config):
    """spread(*overrides) -> (line, state) of a small run with noisy flags in the environment `paid`."""

    def make(*overrides):
        plan = build.plan(config("arm=graft_lookalike", "loophole=held_out", "dataset.train_problems=24", "mask_source.pilot=2",
                                 "mask_source.false_positive=0.4", "optimizer.warmup_steps=0", *overrides))
        policy = build.build_policy(plan)
        return build.build_line(plan, policy, paid, None), State(plan.optimizer.start(policy.adapter))

    return make


def test_the_probe_survives_a_checkpoint_bit_for_bit(spread, tmp_path):
    """Memory, split moments and both blocks: a step after resuming is the step without interruption."""
    line, state = spread()
    for _ in range(2):
        train_step(line, state)
    save_checkpoint(tmp_path, line.policy.adapter, state)
    train_step(line, state)
    other, fresh = spread()
    assert load_checkpoint(tmp_path, other.policy.adapter, fresh)
    assert fresh.memory.keys() == state.memory.keys() == {"weights", "centre", "threshold"}
    assert all(torch.equal(value, state.memory[key]) and value.dtype == state.memory[key].dtype for key, value in fresh.memory.items())
    train_step(other, fresh)
    assert other.policy.adapter.fingerprint() == line.policy.adapter.fingerprint()
    moments, own = state.optimizer.state(), fresh.optimizer.state()
    assert moments.keys() == own.keys() and all(torch.equal(value, own[key]) for key, value in moments.items())


def test_the_pilot_is_of_the_untrained_policy_and_trains_nothing(spread):
    line, state = spread()
    before = line.policy.adapter.fingerprint()
    refresh(line, state)
    assert line.policy.adapter.fingerprint() == before and not state.optimizer.state()
    kept = {key: value.clone() for key, value in state.memory.items()}
    stir(line.policy)
    refresh(line, state)  # once, whatever became of the policy
    assert all(torch.equal(value, kept[key]) for key, value in state.memory.items())
    assert not torch.equal(pilot(line)["weights"], kept["weights"])


# ------------------------------------------------------------------------------------- directions, rollout by rollout


def test_t7_t8_the_highest_share_is_flagged_whatever_the_scale():
    scores = torch.randn(37, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.25, 0.5, 0.9):
        flags = highest(scores, share)
        assert abs(int(flags.sum()) - share * 37) <= 1
        assert scores[flags].min() > scores[~flags].max()
        for monotone in (torch.exp, lambda s: 3 * s - 7, torch.atan):
            assert torch.equal(highest(monotone(scores), share), flags)
    assert highest(torch.zeros(4), 0.5).tolist() == [True, True, False, False]  # ties: the earlier


def test_a_planted_direction_scores_hacks_above_clean_answers():
    """The cosine with the sum of all axes: 1 along it, -1 against it, 0 beside it, whatever the length; none without gradient."""
    basis = Basis({"m": torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), "n": torch.tensor([[0, 1.0]])})
    along = {"m": torch.tensor([[1.0, 1, 0], [-5, -5, 0], [0, 0, 3], [0, 0, 0], [0.1, 0.1, 0]]),
             "n": torch.tensor([[0, 1.0], [0, -5], [2, 0], [0, 0], [0, 0.1]])}
    expected = torch.tensor([1.0, -1.0, 0.0, torch.nan, 1.0])
    assert torch.allclose(alignment(RolloutGrads(along), basis), expected, atol=1e-6, equal_nan=True)


@pytest.fixture
def direction(config):
    return build.plan(config("arm=route_gradient", "loophole=held_out", "mask_source.held_out=0")).mask_source


def test_known_hacks_score_above_clean_answers(tiny_policy, direction):
    """The unit-advantage gradients of the pairs' own answers: hacks lie hackward of the clean answers to the same prompt."""
    policy, pairs = tiny_policy(), load_pairs("prog.yaml", KNOWN)
    basis = direction.fit(policy).basis
    sequences = [(prompt, (*policy.encode(text), policy.end)) for field in ("hack", "clean") for pair, prompt in
                 zip(pairs, policy.encode_prompts([pair.prompt for pair in pairs])) for text in [getattr(pair, field)]]
    tokens = TokenBatch.of(sequences, policy.pad)
    ones = torch.ones(len(tokens), dtype=torch.float64)
    grads = next(iter(rollout_gradients(policy, tokens, ones, PolicyLoss(0.2, 0.0, 100), 64).grads.values()))
    hacks, clean = alignment(grads, Basis({name: rows.double() for name, rows in basis.modules.items()})).view(2, -1)
    assert float((hacks > clean).float().mean()) >= 0.75 and float(hacks.mean()) > float(clean.mean())
    labels, memory = direction.label(StepView(0, [None] * len(tokens), tokens, ones, policy, None, grads), {})
    assert all(torch.equal(memory[f"basis/{name}"], rows) for name, rows in basis.modules.items())
    assert int(labels.flagged.sum()) == round(direction.calibration.share * len(tokens))
    assert float(labels.flagged[: len(pairs)].sum()) > float(labels.flagged[len(pairs) :].sum())


def test_at_level_gradient_a_direction_flags_no_rollout(config):
    source = build.plan(config("arm=erase", "loophole=held_out")).mask_source
    assert source.kind == "subspace" and "gradients" not in source.reads
    assert not flagged(source, seen(mixed(8)[0])).any()


# --------------------------------------------------------------------------------------------------------- T9: rewards


def test_t9_no_source_that_reads_text_follows_the_rewards(tiny_policy):
    policy = tiny_policy()
    texts, _ = mixed(32)
    rewards = torch.linspace(0, 1, 32)
    for source in (detector(recall=0.5, false_positive=0.2), detector(control="rate_matched", recall=0.5), lookalike(recall=0.5),
                   lookalike(control="rate_matched", recall=0.5)):
        memory = source.prepare([seen(texts, step=-1, policy=policy)]) if source.pilot_batches else {}
        straight, turned = (flagged(source, seen(texts, policy=policy, rewards=paid), memory) for paid in (rewards, rewards.flip(0)))
        assert torch.equal(straight, turned) and straight.any()


def test_t9_gradient_labels_do_not_follow_the_rewards_within_a_group(config):
    """Through the line: scores are of advantage 1, so who is paid in a group decides nothing about who is flagged. (Which
    groups are paid alike does: those have no gradient to read.)"""
    plan = build.plan(config("arm=route_gradient", "loophole=held_out", "dataset.train_problems=24"))
    policy = build.build_policy(plan)
    line, state = build.build_line(plan, policy, paid, None), State(plan.optimizer.start(policy.adapter))
    stir(policy)
    refresh(line, state)
    rollouts, _ = sampled(line)
    rewards, labels = torch.arange(16.0).view(4, 4), []
    for own in (rewards, rewards.flip(1), rewards[:, [2, 0, 3, 1]]):
        _, decision = differentiate(line, state, view(line, state, rollouts, own.flatten()))
        labels.append(decision.labels.flagged)
        assert decision.routed.any()
    assert int(labels[0].sum()) == 4 and all(torch.equal(one, labels[0]) for one in labels)
