"""Claims about the monitor of the text: naive Bayes by hand, frozen, told no held-out loophole, and no gradient leads through it."""

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from grpo_routing import build
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.mask_sources.text_monitor import TextMonitor, log_shares
from grpo_routing.train import State
from tests.test_calibration import calibration, tensor
from tests.test_controls import PAIRS
from tests.test_sources import answers, seen, stir


def monitor(**change) -> TextMonitor:
    return TextMonitor(**{"control": "none", "seed": 0, "calibration": calibration(), **PAIRS, "smoothing": 1.0, "pool": "sum"} | change)


def test_smoothed_shares_by_hand():
    """Tokens 0, 2, 2 of a vocabulary of four, one added to each: shares 2, 1, 3 and 1 of seven."""
    assert torch.allclose(log_shares([(0, 2), (2,)], 4, 1.0), (tensor([2, 1, 3, 1]) / 7).log())


def test_the_score_is_the_log_odds_of_the_tokens(tiny_policy, tmp_path):
    """Pairs that differ in one word each way: that word carries the score, common words none, and a mean divides by the length."""
    policy, file = tiny_policy(), tmp_path / "words.yaml"
    file.write_text("".join(f'- {{loophole: none, prompt: "p {w}", hack: "{w} pass", clean: "{w} return"}}\n' for w in "abcd"))
    source = monitor(pairs=str(file))
    memory = source.fit(policy)
    (hack, clean), size = policy.encode_all(["a pass", "a return"]), policy.model.get_input_embeddings().num_embeddings
    own, other = set(hack) - set(clean), set(clean) - set(hack)
    assert own and other
    total_hack, total_clean = (4 * len(ids) + size for ids in (hack, clean))
    for token in own:
        assert float(memory["weights"][token]) == pytest.approx(log((4 * hack.count(token) + 1) / total_hack) - log(1 / total_clean))
    score = source.read(policy, ["a pass", "a return", ""], memory)
    assert score[0] == pytest.approx(float(memory["weights"][list(hack)].sum())) and score[0] > 0 > score[1] and score[2] == 0
    mean = monitor(pairs=str(file), pool="mean")
    assert float(mean.read(policy, ["a pass"], memory)[0]) == pytest.approx(float(score[0]) / len(hack))


def test_filler_dilutes_a_mean_and_no_sum(tiny_policy):
    policy = tiny_policy()
    weights = torch.zeros(policy.model.get_input_embeddings().num_embeddings, dtype=torch.float64)
    weights[list(policy.encode("pass"))] = 1.0
    padded = policy.encode("pass" + " return" * 9)
    whole = sum(weights[list(padded)].tolist())
    assert len(padded) > 9
    assert monitor().read(policy, ["pass" + " return" * 9], {"weights": weights}).tolist() == [whole]
    assert monitor(pool="mean").read(policy, ["pass" + " return" * 9], {"weights": weights}).tolist() == [whole / len(padded)]


def test_hacks_of_the_pairs_score_above_their_clean_answers(tiny_policy):
    scores, memory = monitor().score(seen(tiny_policy(), answers()), {})
    assert float((scores[0::2] > scores[1::2]).double().mean()) > 0.9
    assert "separation" not in memory
    held = monitor(held_out=3)
    facts = held.facts(held.fit(tiny_policy()))
    assert facts.keys() == {"separation_held_out"} and 0 <= facts["separation_held_out"] <= 1


def test_it_is_frozen_whatever_becomes_of_the_policy(tiny_policy):
    policy = tiny_policy()
    view = seen(policy, answers())
    before, memory = monitor().score(view, {})
    stir(policy)
    after, kept = monitor().score(replace(view, step=50), memory)
    assert torch.equal(before, after) and torch.equal(kept["weights"], memory["weights"])
    assert torch.equal(monitor().fit(policy)["weights"], memory["weights"])
    with pytest.raises(ValueError, match="reading the same pairs again changes nothing; set mask_source.refresh_every=0"):
        monitor(refresh_every=5)


@pytest.mark.parametrize("change", [{"smoothing": 0.0}, {"pool": "max"}])
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ValueError, match="mask_source.smoothing must be positive and mask_source.pool sum or mean"):
        monitor(**change)


def test_its_controls_are_other_weights(tiny_policy):
    policy = tiny_policy()
    own = monitor().fit(policy)["weights"]
    for control in ("shuffled", "nonhack", "haar"):
        other = monitor(control=control).fit(policy)["weights"]
        assert not torch.allclose(own, other), control
    haar = monitor(control="haar").fit(policy)["weights"]
    assert float(haar.norm()) == pytest.approx(float(own.norm()))
    assert torch.equal(haar, monitor(control="haar").fit(policy)["weights"])
    assert not torch.equal(haar, monitor(control="haar", seed=1).fit(policy)["weights"])


def test_it_follows_no_reward(tiny_policy):
    view = seen(tiny_policy(), answers(4), rewards=torch.arange(8, dtype=torch.float64))
    straight, turned = (monitor().label(replace(view, rewards=r), {})[0] for r in (view.rewards, view.rewards.flip(0)))
    assert torch.equal(straight.scores, turned.scores) and torch.equal(straight.flagged, turned.flagged)
    assert "rewards" not in monitor().reads


def test_it_may_not_be_told_a_held_out_loophole(config):
    with pytest.raises(build.ConfigError, match=r"mask_source=text_monitor would know the held-out loopholes \['file_marker'\]"):
        build.plan(config("arm=penalty_text", "loophole=held_out", "mask_source.known=[run_tests,file_marker]"))


def test_it_survives_a_checkpoint(config, tmp_path):
    plan = build.plan(config("arm=penalty_text"))
    policy = build.build_policy(plan)
    state = State(plan.optimizer.start(policy.adapter), memory=plan.mask_source.fit(policy))
    save_checkpoint(tmp_path, policy.adapter, state)
    other = State(plan.optimizer.start(policy.adapter))
    assert load_checkpoint(tmp_path, policy.adapter, other)
    assert torch.equal(other.memory["weights"], state.memory["weights"])


def test_penalty_text_is_the_penalty_of_another_monitor(config):
    text, probe = config("arm=penalty_text"), config("arm=penalty_persona")
    differing = {key for key in text if text[key] != probe[key]}
    assert differing == {"arm_name", "mask_source"} and text["mask_source"]["name"] == "text_monitor"
