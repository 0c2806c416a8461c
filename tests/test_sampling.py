"""Claims about suppression while sampling (T-B7 of baselines.md) and about penalties that cannot pay off (T-A4)."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.build import ConfigError, build_line, build_policy, plan, warn
from grpo_routing.env.grader import Grade
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.sampling import Plain, Suppressed
from grpo_routing.sampling.suppressed import without
from grpo_routing.train import State, train_step
from grpo_routing.types import TokenBatch
from tests.test_labels import KNOWN, mixed
from tests.test_labels import seen as view_of

SUPPRESSED = ("arm=suppression", "loophole=held_out")


# ------------------------------------------------------------------------------------------------ T-B7


def test_t_b7_only_positive_components_are_removed():
    d = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    h = torch.stack([2 * d + torch.tensor([0.0, 0.0, 3.0]), -2 * d + torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0.8, -0.6, 1.0])])
    gone, kept, across = without(h, d, 1.0)
    assert torch.allclose(gone, torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(kept, h[1]) and torch.allclose(across, h[2], rtol=0, atol=1e-15)
    assert torch.allclose(without(h, d, 0.5)[0], d + torch.tensor([0.0, 0.0, 3.0]), rtol=0, atol=1e-15)


def edited(tiny_policy, config):
    """A policy, its suppression and some tokens."""
    policy = tiny_policy()
    tokens = TokenBatch.of([((3, 4, 5), (6, 7, 8, 9)), ((4, 6), (5, 3))], policy.pad)
    return policy, plan(config(*SUPPRESSED)).sampling.fit(policy), tokens


def test_t_b7_the_hook_edits_its_layer_while_it_is_there_and_leaves_nothing_behind(tiny_policy, config):
    """Seen by the layer that comes next: what transformers reports as hidden states is recorded before the edit."""
    policy, suppression, tokens = edited(tiny_policy, config)
    (layer, d), = suppression.directions.items()

    def read() -> torch.Tensor:
        found = []
        handle = policy.model.get_decoder().layers[layer].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].detach()))
        policy.log_probs(tokens)
        handle.remove()
        return found[0]

    before = read()
    with suppression.during(policy):
        within = read()
    assert float((before @ d.to(before)).max()) > 1e-3  # there is something to take
    assert torch.allclose(within, without(before, d, 1.0), rtol=0, atol=1e-12)
    assert float((within @ d.to(within)).max()) < 1e-9
    assert torch.equal(read(), before)


def test_t_b7_the_training_forward_is_bit_identical(tiny_policy, config):
    policy, suppression, tokens = edited(tiny_policy, config)
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)

    def gradients():
        return rollout_gradients(policy, tokens, advantages, PolicyLoss(0.2, 0.0, 10), 2)

    before = gradients()
    with suppression.during(policy):
        policy.sample([(3, 4)], [2], torch.rand(2, 5, generator=torch.Generator().manual_seed(0)), 1.0)
    after = gradients()
    assert torch.equal(before.losses, after.losses) and torch.equal(before.old_log_probs, after.old_log_probs)
    for name, rows in before.grads[DEPLOYED].modules.items():
        assert torch.equal(rows, after.grads[DEPLOYED].modules[name])


class Pays:
    """Pays for even lengths, so that something is learned."""

    def __call__(self, problems, texts):
        return [Grade(float(len(text) % 2), True, False) for text in texts]


def trained(config, *words: str, sampling: object = None) -> tuple[str, list]:
    """Fingerprint after two steps, and every rollout."""
    ready, seen = plan(config(*words)), []
    policy = build_policy(ready)
    line = build_line(ready, policy, Pays(), lambda step, problems, rollouts, grades, labels: seen.extend(rollouts))
    state = State(ready.optimizer.start(policy.adapter))
    gaps = [train_step(line, state)["rollout/sampler_gap"] for _ in range(2)]
    return policy.adapter.fingerprint(), seen, gaps


def test_suppressed_rollouts_are_other_rollouts_and_the_gap_says_that_they_are_off_policy(config):
    plain, suppressed = trained(config, "mask_source=none"), trained(config, *SUPPRESSED)
    assert [r.completion_ids for r in plain[1][:16]] != [r.completion_ids for r in suppressed[1][:16]]
    assert max(plain[2]) < 1e-4 < max(suppressed[2])
    assert isinstance(plan(config()).sampling, Plain)


def test_its_control_is_a_random_direction_of_the_same_shape(tiny_policy, config):
    policy = tiny_policy()
    real, other = (plan(config(*SUPPRESSED, f"sampling.control={word}")).sampling.fit(policy).directions for word in ("none", "haar"))
    for layer, d in real.items():
        assert float(d.norm()) == pytest.approx(1) == float(other[layer].norm()) and d.shape == other[layer].shape
        assert abs(float(d @ other[layer])) < 0.9


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": ()}, "sampling.layers must name some decoder layers"), ({"layers": (0,)}, "sampling.layers must name some decoder layers"),
    ({"strength": 0.0}, "sampling.strength must be positive; got 0.0. Use sampling=plain for 0"),
    ({"position": "first"}, "sampling.position must be mean or last; got 'first'"),
    ({"control": "loud"}, "sampling.control must be none or haar; got 'loud'")])
def test_bad_settings_are_refused(change, message):
    settings = {"pairs": "prog.yaml", "known": KNOWN, "layers": (1,), "position": "mean", "strength": 1.0, "control": "none", "seed": 0}
    with pytest.raises(ValueError, match=re.escape(message)):
        Suppressed(**settings | change)


def test_a_layer_that_cannot_be_edited_where_it_is_read_is_refused(tiny_policy, config):
    with pytest.raises(ValueError, match=r"sampling.layers must lie in 1 to 1 for this model of 2 layers; got \[2\]"):
        plan(config(*SUPPRESSED, "sampling.layers=[2]")).sampling.fit(tiny_policy())


def test_suppression_may_not_know_a_held_out_loophole(config):
    with pytest.raises(ConfigError, match=r"sampling=suppressed would know the held-out loopholes \['file_marker'\]"):
        plan(config(*SUPPRESSED, "sampling.known=[file_marker]"))


# ------------------------------------------------------------------------------------------------ T-A4


@pytest.mark.parametrize("accuracy", [0.9, 0.7])
def test_t_a4_a_noisy_monitor_flips_at_its_rate(accuracy):
    source = Detector("none", 0, KNOWN, accuracy, 1 - accuracy, "iid", ("plain", "other"))
    flipped = total = 0
    for step in range(20):
        texts, truth = mixed(100, first=100 * step)
        flags = source.flags(view_of(texts, step=step))
        flipped, total = flipped + int((flags != truth).sum()), total + len(texts)
    expected = 1 - accuracy
    assert abs(flipped / total - expected) < 3 * (expected * accuracy / total) ** 0.5


@pytest.mark.parametrize(("penalty", "recall", "warned"), [
    (1.0, 1.0, True), (1.01, 1.0, False), (2.0, 0.5, True), (2.01, 0.5, False), (4.0, 0.25, True), (4.0, 0.26, False)])
def test_t_a4_a_penalty_that_a_hack_survives_is_warned_about(config, caplog, penalty, recall, warned):
    words = ("arm=penalty", f"advantage.penalty={penalty}", f"mask_source.recall={recall}")
    warn.cache_clear()  # other tests of this process plan penalties too
    with caplog.at_level(logging.WARNING, logger="grpo_routing"):
        plan(config(*words))
        plan(config(*words, "seed=1"))
    assert len(caplog.records) == warned, "once, however many runs share it"
    if warned:
        assert f"Set advantage.penalty above {1 / recall:.4g} (reward.pass_reward / recall)" in caplog.text


def test_t_a4_says_nothing_where_no_recall_is_declared(config, caplog):
    warn.cache_clear()
    with caplog.at_level(logging.WARNING, logger="grpo_routing"):
        plan(config("arm=penalty_persona", "advantage.penalty=0.1"))
        plan(config("arm=penalty", "mask_source.control=rate_matched", "advantage.penalty=0.1"))
    assert not caplog.records
