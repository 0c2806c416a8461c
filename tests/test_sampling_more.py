"""Further claims about sampling (T-B7 of baselines.md): which direction, anchors and pilot, and that a plain line is what it was."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

from grpo_routing import build
from grpo_routing.extra_rollouts import NoExtra
from grpo_routing.sampling import Plain, Suppressed
from grpo_routing.train import State, pilot, train_step
from tests.test_routing import paid, stir

SETTINGS = {"pairs": "prog.yaml", "known": ("run_tests", "sentinel"), "layers": (1,), "position": "mean", "strength": 1.0,
            "control": "none", "seed": 0}


def hooks(policy) -> int:
    return sum(len(module._forward_hooks) for module in policy.model.modules())


def started(config, *words):
    """(line, state, the rollouts that its audit saw) of an environment that pays by length, adapter off its starting point."""
    ready, seen = build.plan(config(*words)), []
    policy = build.build_policy(ready)
    stir(policy)
    line = build.build_line(ready, policy, paid, lambda step, problems, rollouts, grades, labels: seen.append(rollouts))
    return line, State(ready.optimizer.start(policy.adapter)), seen


def test_the_hooks_go_even_when_sampling_fails(tiny_policy):
    policy = tiny_policy()
    suppression = Suppressed(**SETTINGS).fit(policy)
    before = hooks(policy)  # transformers leaves its own on a model whose hidden states were read once
    with pytest.raises(RuntimeError, match="cut off"), suppression.during(policy):
        assert hooks(policy) == before + 1
        raise RuntimeError("cut off")
    assert hooks(policy) == before


@pytest.mark.parametrize("control", ["none", "haar"])
@pytest.mark.parametrize("position", ["mean", "last"])
def test_the_direction_is_that_of_the_mask_source(config, tiny_policy, control, position):
    """Of all pairs, on the frozen model, wherever the adapter stands; the control's as well."""
    policy = tiny_policy()
    source = build.plan(config("mask_source=persona_activation", "mask_source.layers=[1]", "mask_source.held_out=0")).mask_source
    source = replace(source, control=control, position=position, known=SETTINGS["known"])
    sampling = Suppressed(**SETTINGS | {"control": control, "position": position})
    (d,) = sampling.fit(policy).directions.values()
    assert torch.equal(d, source.probe(policy)["v/1"]) and float(d.norm()) == pytest.approx(1.0, abs=1e-12)
    stir(policy)
    assert torch.equal(sampling.fit(policy).directions[1], d)


def test_a_layer_that_tells_no_pair_apart_is_refused(tiny_policy):
    """A first layer that adds nothing leaves the last token's embedding, which all answers share."""
    policy = tiny_policy()
    first = policy.model.model.layers[0]
    with torch.no_grad():
        for module in (first.self_attn.o_proj, first.mlp.down_proj):
            module.weight.zero_()
    with pytest.raises(ValueError, match="no direction in layer 1: .* Choose others with sampling.layers or sampling.position"):
        Suppressed(**SETTINGS | {"position": "last"}).fit(policy)


@dataclass(frozen=True)
class Written(NoExtra):
    """Rollouts that are there already; the policy samples none."""

    rollouts: tuple

    def __call__(self, policy, prompts, group, seed):
        return list(self.rollouts)


def test_t_b7_a_step_on_suppressed_rollouts_is_a_plain_lines_step_on_them_bit_for_bit(config):
    edited, state, seen = started(config, "sampling=suppressed")
    metrics = train_step(edited, state)
    plain, other, _ = started(config)
    same = train_step(replace(plain, extra_rollouts=Written(tuple(seen[0]))), other)
    assert metrics["train/gradient_norm"] > 0 and edited.policy.adapter.fingerprint() == plain.policy.adapter.fingerprint()
    for name in ("train/gradient_norm", "train/ratio", "train/reward"):
        assert metrics[name] == same[name]


def test_anchors_are_sampled_under_it_and_a_pilot_is_not(config):
    """Anchors train; a pilot shows the untrained policy as it is."""
    words = ("adapter.quarantine_rank=2", "extra_rollouts=anchor", "extra_rollouts.groups=2", "mask_source=reward_quantile",
             "mask_source.calibration.rule=pilot", "mask_source.calibration.pilot=1")
    (plain, before, ours), (edited, after, theirs) = started(config, *words), started(config, *words, "sampling=suppressed")
    assert all(torch.equal(pilot(plain)[key], value) for key, value in pilot(edited).items())
    train_step(plain, before)
    train_step(edited, after)
    anchors = [[r.completion_ids for r in seen[0] if r.source == "anchor"] for seen in (ours, theirs)]
    assert len(anchors[0]) == len(anchors[1]) == 8 and anchors[0] != anchors[1]


class Nothing:
    """A stage that is not there."""

    def during(self, policy):
        return nullcontext()


def test_t_b7_plain_sampling_is_no_stage_at_all(config):
    """Bit for bit, and not one hook on the model while rollouts are written."""
    prints, counts = [], []
    for stage in (None, Nothing()):
        line, state, _ = started(config)
        assert type(line.sampling) is Plain
        line = replace(line, sampling=stage or line.sampling)
        with line.sampling.during(line.policy):
            counts.append(hooks(line.policy))
        for _ in range(2):
            train_step(line, state)
        prints.append(line.policy.adapter.fingerprint())
    assert prints[0] == prints[1] and counts == [0, 0]
