"""Claims about negative controls: as many flags as the source's own, and nothing of what they meant.

T5 and T6 are property tests of graft.md §6.1.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from grpo_routing.mask_sources.ceiling import Ceiling
from grpo_routing.mask_sources.composition import Not
from grpo_routing.mask_sources.controls import OF_LABELS, controlled, draws
from grpo_routing.mask_sources.direction import completion_gradients, fit_basis, overlap
from grpo_routing.mask_sources.fingerprint import Fingerprint
from grpo_routing.mask_sources.pairs import PairFileError, load_pairs
from grpo_routing.mask_sources.persona_activation import PersonaActivation
from grpo_routing.mask_sources.persona_gradient import PersonaGradient
from grpo_routing.mask_sources.reward_quantile import RewardQuantile
from grpo_routing.mask_sources.trusted_subspace import TrustedSubspace
from grpo_routing.types import Labels
from tests.test_calibration import F64, NAN, calibration, randoms, stage, tensor

KNOWN = ("run_tests", "sentinel", "stdout_marker")
DEALT = OF_LABELS[1:]
PAIRS = {"pairs": "prog.yaml", "known": KNOWN, "held_out": 0, "refresh_every": 0, "overlap_floor": 0.2, "when_stale": "warn"}


def some_labels(count: int, seed: int, soft: bool = False) -> Labels:
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    trusted = draw < 0.3
    return Labels(torch.where(draw > 0.6, draw if soft else 1.0, 0.0), trusted, torch.arange(count, dtype=F64))


def activation(**change) -> PersonaActivation:
    return PersonaActivation(**{"control": "none", "seed": 0, "calibration": calibration(), **PAIRS, "level": "rollout",
                                "place": "residual", "layers": (0, 1), "position": "mean", "model": "base", "statistic": "mean"} | change)


def grift(**change) -> Fingerprint:
    return Fingerprint(**{"control": "none", "seed": 0, "calibration": calibration(), **PAIRS, "layers": 0, "sketch": 8, "window": 8,
                          "temperature": 1.0, "residualise": True, "micro_batch": 8} | change)


@pytest.fixture
def gradient(tmp_path):
    def make(**change) -> PersonaGradient:
        return PersonaGradient(**{"control": "none", "seed": 0, "calibration": calibration(), **PAIRS, "level": "rollout",
                                  "measure": "cosine", "advantage": "unit", "k": 2, "per_loophole": False, "tau": 0.0, "floor": 0.0,
                                  "micro_batch": 64,
                                  "cache": str(tmp_path / "directions")} | change)

    return make


# ------------------------------------------------------------------------------------------------------------ of labels


@pytest.mark.parametrize("control", DEALT)
@pytest.mark.parametrize("soft", [False, True])
def test_t5_every_label_is_dealt_once(control, soft):
    """Flags, trust and scores move together: the same multiset of labels in every step."""
    for step in range(20):
        own = some_labels(24, step, soft)
        dealt = controlled(control, own, stage(24, step=step), seed=3)
        assert sorted(dealt.scores.tolist()) == own.scores.tolist()
        rows = dealt.scores.long()
        assert torch.equal(dealt.flagged, own.flagged[rows]) and torch.equal(dealt.trusted, own.trusted[rows])
        assert not torch.equal(dealt.flagged, own.flagged)


def test_t5_permuted_keeps_the_labels_of_every_prompt():
    own = some_labels(24, 0)
    for step in range(10):
        dealt = controlled("permuted", own, stage(24, step=step), seed=0)
        assert torch.equal(dealt.scores.view(6, 4).sort(1).values, own.scores.view(6, 4))


def test_t6_rate_matched_flags_know_nothing_and_permuted_ones_only_the_prompt():
    """Mutual information with the truth in bits, of a source that is right: one bit before, next to none after."""
    truth = (torch.arange(64) // 2) % 2 == 1  # half of every group of 4
    kept = {control: torch.cat([controlled(control, Labels.of(truth.to(F64)), stage(64, step=step), 0).flagged > 0 for step in range(40)])
            for control in ("none", "rate_matched", "permuted", "inverted")}

    def information(flags):
        joint = torch.histogramdd(torch.stack([truth.repeat(40), flags], 1).double(), [2, 2]).hist / len(flags)
        chance = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return float((joint * (joint / chance).clamp_min(1e-12).log2()).sum())

    assert information(kept["none"]) == pytest.approx(1.0)
    assert information(kept["rate_matched"]) < 0.005 and information(kept["permuted"]) < 0.005
    assert torch.equal(kept["inverted"], ~kept["none"])


def test_permuted_knows_what_the_prompts_know():
    """Where whole prompts hack, dealing within a prompt changes nothing; dealing over the step does."""
    own = Labels.of((torch.arange(32) < 16).to(F64))
    assert torch.equal(controlled("permuted", own, stage(32), 0).flagged, own.flagged)
    assert not torch.equal(controlled("rate_matched", own, stage(32), 0).flagged, own.flagged)


@pytest.mark.parametrize("count", [0, 3, 8, 12, 16])
def test_inverted_flags_the_unflagged_first(count):
    for step in range(5):
        own = torch.zeros(16, dtype=F64)
        own[torch.randperm(16, generator=torch.Generator().manual_seed(step))[:count]] = 1
        dealt = controlled("inverted", Labels.of(own), stage(16, step=step), 0).flagged
        assert int(dealt.sum()) == count and int(dealt[own == 0].sum()) == min(count, 16 - count)


def test_inverted_turns_the_order_of_soft_flags():
    soft = tensor([0.1, 0.9, 0.4, 0.6])
    assert controlled("inverted", Labels.of(soft), stage(4), 0).flagged.tolist() == [0.9, 0.1, 0.6, 0.4]


def test_prompt_only_flags_whole_prompts_those_with_the_most_flags_first():
    """Of 1, 4, 0 and 2 flags in prompts of 4, seven in all: the second prompt whole, three of the fourth, whichever."""
    own, chosen = tensor([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1]), set()
    for step in range(10):
        dealt = controlled("prompt_only", Labels.of(own), stage(16, step=step), 0).flagged
        assert dealt.view(4, 4).sum(1).tolist() == [0, 4, 0, 3]
        chosen.add(tuple(dealt[12:].tolist()))
    assert len(chosen) == 4, "which three is drawn anew in every step"


@pytest.mark.parametrize("control", DEALT)
def test_a_control_is_drawn_by_name(control):
    """Seed and step decide, and nothing that was drawn before."""
    own, view = some_labels(24, 1), stage(24, step=5)
    first = controlled(control, own, view, seed=0)
    torch.rand(7)
    assert torch.equal(controlled(control, own, view, seed=0).scores, first.scores)
    assert not torch.equal(controlled(control, own, view, seed=1).scores, first.scores)
    assert not torch.equal(controlled(control, own, replace(view, step=6), seed=0).scores, first.scores)
    assert draws(control, view, 0).min() >= 0 and draws(control, view, 0).max() < 1


@pytest.mark.parametrize("control", ["permuted", "inverted", "prompt_only"])
def test_the_order_of_the_prompts_changes_no_label(control):
    """Ranks by draw or within a prompt do not see it; `rate_matched` deals over the step as it lies, and does."""
    own, view = Labels.of(some_labels(24, 2).flagged), stage(24)
    order = torch.tensor([row for group in (3, 0, 5, 1, 4, 2) for row in range(4 * group, 4 * group + 4)])
    moved = replace(view, rollouts=[view.rollouts[row] for row in order])
    straight, turned = controlled(control, own, view, 0), controlled(control, own.at(order), moved, 0)
    assert torch.equal(turned.flagged, straight.flagged[order])
    assert torch.equal(draws(control, moved, 0), draws(control, view, 0)[order])


def test_every_source_of_labels_takes_them():
    """Also a composition, and one without scores."""
    truth = tensor([1, 0, 0, 0, 0, 0, 1, 0])
    view = stage(8, ceiling=lambda: truth)
    for control in DEALT:
        for source in (Ceiling(control, 0), Not(control, 0, inner=Ceiling("none", 0))):
            labels, memory = source.label(view, {})
            assert int(labels.flagged.sum()) == (2 if isinstance(source, Ceiling) else 6) and memory == {}
            if control == "inverted":
                assert not labels.flagged[truth == float(isinstance(source, Ceiling))].all()


# ------------------------------------------------------------------------------------------------------------ of scores


def paid(control, **change) -> RewardQuantile:
    return RewardQuantile(control, 0, calibration(**change))


def test_inverted_scores_flag_the_lowest_and_trust_the_highest():
    rewards = tensor([3, 1, 4, 1.5, 5, 9, 2, 6])
    view = stage(8, rewards=rewards)
    labels, _ = paid("inverted", trusted_share=0.25).label(view, {})
    assert labels.flagged.nonzero().flatten().tolist() == [1, 3] and labels.trusted.nonzero().flatten().tolist() == [5, 7]
    own, _ = paid("none").label(view, {})
    assert own.flagged.nonzero().flatten().tolist() == [5, 7]


def test_random_scores_flag_as_many_whatever_is_scored():
    flags = [paid("random").label(stage(16, rewards=rewards), {})[0].flagged for rewards in (randoms(16), randoms(16, 1))]
    assert torch.equal(*flags) and int(flags[0].sum()) == 4
    other = paid("random").label(stage(16, step=1), {})[0].flagged
    assert int(other.sum()) == 4 and not torch.equal(other, flags[0])


def test_random_scores_are_only_where_there_was_one():
    rewards = randoms(16)
    rewards[::2] = NAN
    labels, _ = paid("random", share=0.5).label(stage(16, rewards=rewards), {})
    assert int(labels.flagged.sum()) == 4 and not labels.flagged[::2].any() and labels.scores[::2].isnan().all()


def test_random_scores_have_a_pilot_of_their_own():
    """The cut is the draws' own quantile, so the share is kept though the scores are on another scale."""
    source = paid("random", rule="pilot", share=0.25)
    memory = source.prepare([stage(256, step=step, rewards=1000 + randoms(256)) for step in (-2, -1)])
    assert float(memory["cut"]) == pytest.approx(0.75, abs=0.05)
    flags = torch.cat([source.label(stage(256, step=step), memory)[0].flagged for step in range(4)])
    assert float(flags.mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("kind", ["reward_quantile", "fingerprint", "persona_activation"])
def test_random_scores_mean_nothing_to_a_fixed_threshold(kind):
    """Draws in [0, 1) all exceed 0: the control of a source that is calibrated so would flag everything."""
    threshold = calibration(rule="threshold")
    make = {"reward_quantile": lambda: RewardQuantile("random", 0, threshold), "persona_activation": lambda: activation(
        control="random", calibration=threshold), "fingerprint": lambda: grift(control="random", calibration=threshold)}[kind]
    with pytest.raises(ValueError, match="mask_source.control=random draws scores, and calibration.rule=threshold is on the source's own "
                                         "scale; choose control=rate_matched, or another rule"):
        make()


# ------------------------------------------------------------------------------------------------------------- of pairs


def rewritten(folder, **fields) -> str:
    """The pairs with some answers replaced by others, as a file."""
    pairs = load_pairs("prog.yaml", KNOWN)
    file = folder / "rewritten.yaml"
    file.write_text(yaml.safe_dump([{"loophole": p.loophole, "prompt": p.prompt, "hack": p.hack, "clean": p.clean, "neutral": p.neutral}
                                    | {field: getattr(p, other) for field, other in fields.items()} for p in pairs]))
    return str(file)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(value, other[key], atol=1e-6) for key, value in one.items())


def test_nonhack_reads_neutral_answers_where_hacks_would_stand(tiny_policy, gradient, tmp_path):
    policy, file = tiny_policy(), rewritten(tmp_path, hack="neutral")
    real, control, expected = (activation(**change).probe(policy) for change in ({}, {"control": "nonhack"}, {"pairs": file}))
    assert same(control, expected) and not same(control, real)
    control, expected = (gradient(**change).fit(policy).basis.modules for change in ({"control": "nonhack"}, {"pairs": file}))
    assert same(control, expected)


def test_nonhack_needs_neutral_answers(gradient, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("".join(f"- {{loophole: run_tests, prompt: p{n}, hack: h, clean: c}}\n" for n in range(3)))
    for make in (activation, gradient):
        with pytest.raises(PairFileError, match=r"mask_source.control=nonhack needs a `neutral` completion in every pair; .* \[1, 2, 3\]"):
            make(control="nonhack", pairs=str(file))


def test_shuffled_deals_the_same_answers_to_sides_that_mean_nothing(tiny_policy, gradient):
    """Each of the 2N answers once; rows are differences of whoever was dealt together."""
    policy, pairs = tiny_policy(), load_pairs("prog.yaml", KNOWN)
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.hack, pair.clean)]
    source = activation(control="shuffled")
    order = source.dealt(len(pairs))
    assert sorted(order) == list(range(len(texts))) and order != source.dealt(len(pairs) - 1)
    assert order == gradient(control="shuffled").dealt(len(pairs)) != activation(control="shuffled", seed=1).dealt(len(pairs))
    first, second = order[: len(pairs)], order[len(pairs) :]
    h, probe = source.activations(policy, policy.batch(texts)), source.probe(policy)
    for name, rows in h.items():
        v = torch.nn.functional.normalize(rows[first] - rows[second], dim=1).mean(0)
        assert torch.allclose(probe[f"v/{name}"], torch.nn.functional.normalize(v, dim=0))
    assert not same(probe, activation().probe(policy))
    grads = completion_gradients(policy, texts, 64)
    expected = fit_basis({name: g[first] - g[second] for name, g in grads.items()}, 2, 0.0, 0.0)
    assert overlap(gradient(control="shuffled").fit(policy).basis, expected) == pytest.approx(1.0, abs=1e-6)


def test_haar_is_a_random_direction_of_the_same_shape(tiny_policy, gradient):
    policy = tiny_policy()
    real, control, again, other = (activation(**change).probe(policy) for change in (
        {}, {"control": "haar"}, {"control": "haar", "statistic": "t"}, {"control": "haar", "seed": 1}))
    for key in ("v/0", "v/1"):
        assert control[key].shape == real[key].shape and float(control[key].norm()) == pytest.approx(1.0)
        assert torch.equal(control[key], again[key]) and abs(float(control[key] @ real[key])) < 0.6
        assert abs(float(control[key] @ other[key])) < 0.6
    bases = [gradient(**change).fit(policy).basis for change in ({}, {"control": "haar"}, {"control": "haar", "seed": 1})]
    assert all({n: r.shape for n, r in b.modules.items()} == {n: r.shape for n, r in bases[0].modules.items()} for b in bases)
    assert overlap(bases[0], bases[1]) < 0.1 and overlap(bases[1], bases[2]) < 0.1


def test_of_a_basis_random_turns_the_axes_and_inverted_their_signs(tiny_policy, gradient):
    policy = tiny_policy()
    real, random_, inverted = (gradient(level="gradient", control=control).fit(policy).basis for control in ("none", "random", "inverted"))
    assert overlap(real, random_) < 0.1
    assert all(torch.equal(inverted.modules[name], -rows) for name, rows in real.modules.items())


def test_of_scores_random_and_inverted_leave_the_fit_alone(tiny_policy, gradient):
    policy = tiny_policy()
    real, *others = (gradient(control=control).fit(policy).basis.modules for control in ("none", "random", "inverted", "rate_matched"))
    assert all(same(real, other) for other in others)
    real, *others = (activation(control=control).probe(policy) for control in ("none", "random", "inverted", "rate_matched"))
    assert all(same(real, other) for other in others)


# ------------------------------------------------------------------------------------------------------ unknown controls


def test_an_unknown_control_is_refused_with_the_legal_ones(gradient):
    of_labels = "none, rate_matched, permuted, inverted, prompt_only"
    of_pairs = f"{of_labels}, random, shuffled, nonhack"
    cases = [
        (lambda word: Ceiling(word, 0), of_labels, "random"),
        (paid, f"{of_labels}, random", "haar"),
        (lambda word: activation(control=word), f"{of_pairs}, haar", "rate_match"),
        (lambda word: activation(control=word, level="gradient", place="coordinates"), "none, shuffled, nonhack, haar", "rate_matched"),
        (lambda word: gradient(control=word), f"{of_pairs}, haar", "typo"),
        (lambda word: gradient(control=word, level="gradient"), "none, random, shuffled, nonhack, inverted", "permuted"),
        (lambda word: grift(control=word), of_pairs, "haar"),
        (lambda word: TrustedSubspace(word, 0, "prog.yaml", KNOWN, 1, "singular", 1, 1e-3, 8), "none, random", "shuffled"),
    ]
    for make, legal, word in cases:
        with pytest.raises(ValueError, match=f"mask_source.control must be one of {legal} here; got '{word}'"):
            make(word)
        for good in legal.split(", "):
            make(good)


def test_the_control_that_a_sweep_adds_is_a_legal_one(gradient):
    for source in (Ceiling("none", 0), paid("none"), activation(), activation(level="gradient", place="coordinates"), gradient(),
                   gradient(level="gradient")):
        assert source.default_control in source.controls and source.default_control != "none"
