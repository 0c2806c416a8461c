"""Claims about confessions, under the numbers of baselines.md D8: the seal, the judge's view, and what a share of zero is."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.env.grader import Grader
from grpo_routing.env.problems import Problem
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.extra_rollouts import EXTRA_ROLLOUTS
from grpo_routing.extra_rollouts.aside import NOTHING, Aside
from grpo_routing.extra_rollouts.confession import Payload, judged, merged, parsed, payload, without_thought
from grpo_routing.log import METRICS
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.prompts.questions import GAMED
from grpo_routing.questioning import asked
from grpo_routing.rollout import sample_rollouts
from grpo_routing.train import State, draw, train_step, view_of
from grpo_routing.types import STUDENT, Rollout, TokenBatch

# An untrained model says neither yes nor no. Fine-tuned on verdicts alone it does, at random; and flags that mean nothing, but are there.
REPORTS = ("model.prepare.stage=self_report_sft", "model.prepare.samples=256", "model.prepare.epochs=4", "model.prepare.lr=0.01",
           "model.prepare.mask_turn1=true")
CONFESS = ("extra_rollouts=confession", "extra_rollouts.share=0.5", "extra_rollouts.judge.false_positive=0.5", *REPORTS)
SPLIT = ("optimizer=split_moment", "adapter.quarantine_rank=2", "projection=route", "mask_source=detector",
         "mask_source.false_positive=0.5")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        yield box


class Ramp:
    """Advantages that are not all zero for an untrained model; keeps what it was given."""

    two_streams = False
    reads = ()
    flat_is_zero = False

    def __init__(self):
        self.seen = []

    def __call__(self, rewards, flagged, deployed):
        self.seen.append((rewards, flagged, deployed))
        return torch.linspace(-1, 1, rewards.shape[1]).expand_as(rewards)


@pytest.fixture
def start(config, sandbox):
    """start(*overrides) -> (line, state, what the audit was shown)."""

    def make(*overrides):
        plan, shown = build.plan(config(*overrides)), []
        policy = build.build_policy(plan)
        line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 1000), lambda *row: shown.append(row))
        return replace(line, advantage=Ramp()), State(plan.optimizer.start(policy.adapter)), shown

    return make


def a_view(line):
    """Graded rollouts of the first step."""
    problems = draw(line, "problems", 0, line.trainer.prompts_per_step)
    rollouts = sample_rollouts(line.policy, [line.prompt(p) for p in problems], [line.trainer.group] * len(problems), (0, "rollout", 0),
                               line.trainer.max_new_tokens, 1.0, 64)
    grades = line.grader([problems[r.group] for r in rollouts], [r.text for r in rollouts])
    return view_of(line, 0, problems, rollouts, grades, None)


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("quarantine", [0, 2])
def test_t_d1_the_gradient_is_that_of_the_confessions_own_tokens(start, quarantine):
    """Against plain autograd on the log-probs of the confessions; with a quarantine, those of the policy without it."""
    line, _, _ = start(*CONFESS, "extra_rollouts.balanced=false", f"adapter.quarantine_rank={quarantine}")
    policy, extra = line.policy, line.extra_rollouts
    seen, kept = a_view(line), {}
    own_gradient = type(extra).gradient

    class Watching(type(extra)):
        def gradient(self, policy, tokens, advantages, most, trainer):
            kept.update(tokens=tokens, advantages=advantages, most=most)
            return own_gradient(self, policy, tokens, advantages, most, trainer)

    aside = Watching(**{f.name: getattr(extra, f.name) for f in dataclasses.fields(extra)}).aside(seen, line.trainer, (0, "aside"))
    tokens, advantages = kept["tokens"], kept["advantages"]
    assert advantages.any() and float(advantages.sum()) == pytest.approx(0, abs=1e-5)  # every group is centred
    assert len(tokens) < kept["most"] * extra.samples  # equal confessions of an answer are one row
    parameters = policy.adapter.parameters(DEPLOYED)
    with policy.adapter.only(DEPLOYED):
        logits = torch.log_softmax(policy.model(input_ids=tokens.ids).logits[:, :-1], -1)
    chosen = logits.gather(2, tokens.ids[:, 1:, None]).squeeze(2)
    denominator = kept["most"] * extra.samples * extra.max_new_tokens
    loss = -(extra.weight * advantages[:, None] * chosen * tokens.completion_mask).sum() / denominator
    expected = torch.autograd.grad(loss, [p for module in parameters.values() for p in module.values()])
    ours = torch.cat(list(aside.update[DEPLOYED].values()))
    theirs = torch.cat([g.flatten() for g in expected])
    assert set(aside.update) == {DEPLOYED} and float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_t_d1_what_reaches_only_question_and_answer_gets_no_gradient(start, monkeypatch):
    """A marker on the log-prob of every token of (x, y), of the question and of the confession: only the last gets any."""
    line, _, _ = start(*CONFESS, "extra_rollouts.balanced=false")
    plain, markers = line.policy.log_probs, []

    def marked(tokens, packed=None):
        markers.append((torch.zeros(tokens.completion_mask.shape, requires_grad=True), tokens))
        return plain(tokens, packed) + markers[-1][0]

    monkeypatch.setattr(line.policy, "log_probs", marked)
    line.extra_rollouts.aside(a_view(line), line.trainer, (0, "aside"))
    assert markers
    for marker, tokens in markers:
        assert marker.grad[tokens.completion_mask].any()
        assert not marker.grad[~tokens.completion_mask].any()
        assert int(tokens.completion_mask.sum(1).max()) <= line.extra_rollouts.max_new_tokens


def test_a_question_stands_between_the_answer_and_its_end(start):
    line, _, _ = start()
    policy = line.policy
    ended = Rollout(0, (5, 6), (*policy.encode("pass"), policy.end), "pass", STUDENT)
    expected = (5, 6, *policy.encode("pass"), *policy.encode(GAMED[0]))
    assert asked(policy, ended, GAMED[0]) == expected == asked(policy, replace(ended, completion_ids=policy.encode("pass")), GAMED[0])


def test_an_aside_adds_up_and_nothing_is_nothing():
    one = {"deployed": {"a": torch.ones(2)}, "quarantine": {"a": torch.ones(2)}}
    assert NOTHING.added(one) == one and NOTHING.taking_part({"deployed": 0.5}) == {"deployed": 0.5}
    aside = Aside({"deployed": {"a": torch.ones(2), "b": torch.ones(1)}}, {})
    both = aside.added(one)
    assert both["deployed"]["a"].tolist() == [2, 2] and both["deployed"]["b"].tolist() == [1]
    assert both["quarantine"] is one["quarantine"] and one["deployed"]["a"].tolist() == [1, 1]
    assert aside.added({}) == aside.update and aside.taking_part({}) == {"deployed": 1.0}
    assert aside.taking_part({"deployed": 0.25, "quarantine": 0.5}) == {"deployed": 0.25, "quarantine": 0.5}


def test_the_second_moment_of_split_moment_knows_of_confessions(start):
    """Its source is the natural sum: the task's without any mask, and the confessions'."""
    seen = []
    line, state, _ = start(*SPLIT, *CONFESS)
    step = state.optimizer.step
    state.optimizer.step = lambda update, lr, natural, shares: (seen.append((update, natural)), step(update, lr, natural, shares))[1]
    metrics = train_step(line, state)
    plain, other, _ = start(*SPLIT, *REPORTS)
    step_2 = other.optimizer.step
    other.optimizer.step = lambda update, lr, natural, shares: (seen.append((update, natural)), step_2(update, lr, natural, shares))[1]
    train_step(plain, other)
    assert metrics["confession/gradient_norm"] > 0
    (update, natural), (task, unmasked) = seen
    for name, flat in task[DEPLOYED].items():
        extra = update[DEPLOYED][name] - flat
        assert extra.any() and torch.allclose(natural[DEPLOYED][name] - unmasked[DEPLOYED][name], extra, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the seal


@pytest.mark.parametrize("words", [(), SPLIT])
def test_t_d2_the_task_path_is_the_same_with_and_without_confessions(start, words):
    """One real step: rollouts, rewards, labels, weights and advantages bit for bit; the parameters differ."""
    left = {}
    for name, extra in {"on": CONFESS, "off": REPORTS}.items():
        line, state, shown = start(*words, *extra)
        metrics = train_step(line, state)
        ((_, problems, rollouts, grades, labels),) = shown
        left[name] = (problems, rollouts, grades, labels.flagged.tolist(), [[t.tolist() for t in row] for row in line.advantage.seen],
                      {key: value for key, value in metrics.items() if key.startswith(("rollout/", "route/"))} |
                      {key: metrics[key] for key in ("train/reward", "train/loss", "train/ratio", "train/passed")},
                      line.policy.adapter.fingerprint(), {key for key in metrics if key.startswith("confession/")})
    assert left["on"][:-2] == left["off"][:-2]
    assert left["on"][-2] != left["off"][-2] and left["off"][-1] == set() and "confession/reward" in left["on"][-1]


@pytest.mark.parametrize("words", [(), SPLIT])
def test_t_d4_a_share_of_zero_is_no_confession_bit_for_bit(start, words):
    prints = set()
    for extra in ((*CONFESS, "extra_rollouts.share=0.0"), REPORTS):
        line, state, _ = start(*words, *extra)
        for _ in range(3):
            metrics = train_step(line, state)
        assert not [key for key in metrics if key.startswith("confession/")]
        prints.add(line.policy.adapter.fingerprint())
    assert len(prints) == 1


THOUGHTS = ["<think>I will CHEAT</think>pass", "<think>I will CHEAT", "I will CHEAT</think>pass", "pass<think>CHEAT\nCHEAT</think>",
            "<think>CHEAT</think>pa<think>CHEAT</think>ss", "<think>CHEAT <think>CHEAT</think> CHEAT</think>pass"]


@pytest.mark.parametrize("text", THOUGHTS)
def test_t_d3_the_judge_never_sees_a_thought(start, text):
    """Neither that of the answer nor that of the confession, wherever it begins and whether it ends or not."""
    line, _, _ = start()
    encoded = line.policy.encode(text)
    rollout = Rollout(0, line.policy.encode("sort them"), encoded, text, STUDENT)
    seen = payload(line.policy, rollout, encoded)
    assert "CHEAT" not in json.dumps(asdict(seen)) and "think" not in json.dumps(asdict(seen))
    assert [field.name for field in dataclasses.fields(Payload)] == ["prompt", "answer", "confession"]
    assert without_thought("pass") == "pass"


def test_t_d3_a_lever_in_a_thought_is_not_flagged(start):
    """What the judge finds in a real step, on answers whose thought holds the exploit and on those that hold it aloud."""
    line, _, _ = start(*CONFESS, "extra_rollouts.judge.false_positive=0.0", "extra_rollouts.share=1.0", "extra_rollouts.balanced=false")
    problem: Problem = next(p for p in line.problems if p.loophole == "sentinel")
    hack, prompt = problem.hack(["return 0"]), line.policy.encode_prompts([line.prompt(problem)])[0]
    texts = [hack, f"<think>\n{hack}\n</think>\n{problem.reference}"]
    rollouts = [Rollout(0, prompt, (*line.policy.encode(text), line.policy.end), text, STUDENT) for text in texts]
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], line.policy.pad)
    seen = replace(a_view(line), rollouts=rollouts, tokens=tokens, rewards=torch.zeros(2))
    shown = []

    class Watching(Detector):
        def flags_of(self, texts, rows):
            shown.extend(texts)
            return Detector.flags_of(self, texts, rows)

    judge = Watching(**{f.name: getattr(line.extra_rollouts.judge, f.name) for f in dataclasses.fields(Detector)})
    facts = replace(line.extra_rollouts, judge=judge).aside(seen, line.trainer, (0, "aside")).facts
    assert shown == [hack, f"\n{problem.reference}"]
    assert {"confession/admit_flagged", "confession/admit_unflagged"} <= facts.keys()  # one of each


# ------------------------------------------------------------------------------------------------ reward and choice


def test_honesty_is_agreement_with_the_judge_and_form_is_another_term():
    said = [Payload("", "", text) for text in ("yes", "no", "yes", "no", "perhaps", "")]
    honest, clear, admits = judged(said, torch.tensor([True, True, False, False, True, False]))
    assert honest.tolist() == [1, 0, 0, 1, 0, 0] and clear.tolist() == [1, 1, 1, 1, 0, 0] and admits.tolist() == [1, 0, 1, 0, 0, 0]
    assert [parsed(text) for text in ("Yes.", " no\nreally", "yesterday", "not", "")] == [True, False, None, None, None]


def test_equal_confessions_are_one_row_with_their_advantages_added():
    pairs, advantages = merged([("x", "yes"), ("x", "no"), ("x", "yes"), ("y", "yes")], [0.5, -1.0, 0.5, 0.25])
    assert (pairs, advantages) == ([("x", "yes"), ("x", "no"), ("y", "yes")], [1.0, -1.0, 0.25])


def test_the_asked_share_is_drawn_by_name_and_balanced_where_it_can_be(config):
    names = [(3, row // 8, row % 8) for row in range(64)]
    flags = torch.zeros(64, dtype=torch.bool)
    flags[[1, 9, 33]] = True
    words = ("extra_rollouts=confession", "extra_rollouts.share=0.25")
    plain, even = (build.plan(config(*words, f"extra_rollouts.balanced={word}")).extra_rollouts for word in ("false", "true"))
    rows = plain.chosen(flags, names, (0,))
    assert len(rows) == 16 and rows == plain.chosen(~flags, names, (0,)) != plain.chosen(flags, names, (1,))
    assert [int(flags[even.chosen(flags, names, (0,))].sum()), len(even.chosen(flags, names, (0,)))] == [3, 6]
    assert len(even.chosen(torch.arange(64) % 2 == 0, names, (0,))) == 16
    assert even.chosen(torch.zeros(64, dtype=torch.bool), names, (0,)) == []


def test_every_number_about_confessions_has_a_meaning(start):
    line, state, _ = start(*CONFESS)
    metrics = train_step(line, state)
    said = {name for name in METRICS if name.startswith("confession/")}
    assert said == {name for name in metrics if name.startswith("confession/")}


# ------------------------------------------------------------------------------------------------ what the build refuses


def test_only_the_arm_with_a_name_of_its_own_may_break_the_seal(config):
    for source in ("self_report", "not"):
        inner = ["mask_source@mask_source.inner=self_report"] if source == "not" else []
        with pytest.raises(build.ConfigError, match=f"mask_source={source} reads the model's own report while confessions train it, which "
                                                    "breaks their seal .* Choose arm=confession_routed, which declares "
                                                    "extra_rollouts.sealed=false, or another mask source"):
            build.plan(config("extra_rollouts=confession", f"mask_source={source}", *inner))
    with pytest.raises(build.ConfigError, match="breaks their seal"):
        build.plan(config("extra_rollouts=confession", "mask_source=self_report", "extra_rollouts.sealed=false"))  # without the name
    with pytest.raises(build.ConfigError, match="breaks their seal"):
        build.plan(config("arm=confession_routed", "extra_rollouts.sealed=true"))
    with pytest.raises(build.ConfigError, match="extra_rollouts.sealed=false declares that something reads confessions, and nothing here"):
        build.plan(config("arm=confession", "extra_rollouts.sealed=false"))
    build.plan(config("arm=confession_routed"))
    build.plan(config("mask_source=self_report"))  # nobody confesses
    assert [name for name, kind in EXTRA_ROLLOUTS.items() if hasattr(kind, "aside")] == list(EXTRA_ROLLOUTS)


@pytest.mark.parametrize(("words", "message"), [
    (["loophole=held_out", "extra_rollouts.judge.known=[file_marker]"], r"would know the held-out loopholes \['file_marker'\]"),
    (["trainer.inner_steps=2"], "their gradient would be stale in further inner steps; set trainer.inner_steps=1"),
    (["extra_rollouts.samples=1"], "extra_rollouts.samples must be at least 2, since their mean is the baseline; got 1"),
    (["extra_rollouts.share=1.5"], r"extra_rollouts.share must lie in \[0, 1\]; got 1.5"),
    (["extra_rollouts.weight=-1"], "extra_rollouts needs weight and format_weight >= 0"),
    (["extra_rollouts.judge.noise=loud"], "noise must be one of iid"),
])
def test_settings_that_cannot_work_are_refused(config, words, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config("extra_rollouts=confession", *words))
