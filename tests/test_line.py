"""Claims about THE LINE: with every default it is textbook Dr.GRPO, and its stages see what they should."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from grpo_routing import build
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.policy import inverse_transform
from grpo_routing.rollout import Seat, fill_groups, sample_rollouts, uniforms
from grpo_routing.train import State, batch_of, refresh, train_step
from grpo_routing.types import STUDENT, TEACHER, Rollout, TokenBatch


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        yield box


@pytest.fixture
def start(config, sandbox):
    """start(*overrides, audit) -> (line, state) of a smoke-sized run."""

    def make(*overrides, audit=None):
        plan = build.plan(config(*overrides))
        policy = build.build_policy(plan)
        line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 1000), audit)
        return line, State(plan.optimizer.start(policy.adapter))

    return make


class NoisyAdvantage:
    """Advantages that are not all zero for an untrained model: deterministic, mean zero in every group."""

    two_streams = False
    reads = ()
    flat_is_zero = False

    def __call__(self, rewards, flagged, deployed):
        shape = torch.linspace(-1, 1, rewards.shape[1]).expand_as(rewards).clone()
        return shape - shape.mean(1, keepdim=True)


class Infinite(NoisyAdvantage):
    def __call__(self, rewards, flagged, deployed):
        return torch.full_like(rewards, math.inf)


def test_a_step_of_the_default_line_is_one_textbook_dr_grpo_update(start):
    """Three steps against plain autograd and torch's AdamW on a copy of the model (style.md: vanilla is exact)."""
    seen = []
    line, state = start("optimizer.clip=0.5", audit=lambda step, problems, rollouts, grades, labels: seen.append(rollouts))
    line = dataclasses.replace(line, advantage=NoisyAdvantage())
    copy, _ = start()
    parameters = [p for module in copy.policy.adapter.parameters().values() for p in module.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(3):
        train_step(line, state)
        rollouts = seen[step]
        advantages = NoisyAdvantage()(torch.zeros(4, 4), None, None).flatten()
        tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], copy.policy.pad)
        logits = torch.log_softmax(copy.policy.model(input_ids=tokens.ids).logits[:, :-1].float(), -1)
        chosen = logits.gather(2, tokens.ids[:, 1:, None]).squeeze(2)
        loss = -(advantages[:, None] * chosen * tokens.completion_mask).sum() / (4 * 4 * 12)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = 5e-3 * (step + 1) / 8
        optimizer.step()
        for name, flat in copy.policy.adapter.flatten().items():
            ours = line.policy.adapter.flatten()[name]
            assert float((ours - flat).norm() / flat.norm()) < 1e-5, (step, name)


def test_a_flat_group_has_no_gradient(start):
    line, state = start()
    before = line.policy.adapter.fingerprint()
    metrics = train_step(line, state)
    assert metrics["train/flat_groups"] == 1.0 and metrics["train/gradient_norm"] == 0.0
    assert line.policy.adapter.fingerprint() == before  # AdamW without momentum or decay stands still on a zero gradient


def test_arms_of_a_seed_see_the_same_problems_and_other_seeds_do_not(start):
    (vanilla, _), (erase, _), (other, _) = start(), start("arm=erase"), start("seed=1")
    same = [[p.id for p in batch_of(line, step)] for line in (vanilla, erase) for step in range(3)]
    assert same[:3] == same[3:]
    assert [p.id for p in batch_of(other, 0)] != same[0]


def test_an_epoch_shows_every_problem_once(start):
    line, _ = start("dataset.train_problems=10")
    shown = [p.id for step in range(5) for p in batch_of(line, step)]  # 5 steps of 4 are two epochs of 10
    assert sorted(shown[:10]) == sorted(shown[10:]) == sorted({p.id for p in line.problems})
    assert shown[:10] != shown[10:]


def test_a_rollout_depends_on_its_own_seed_only(start):
    """Whatever shares the batch: other prompts, other group sizes, other chunks of a forward."""
    line, _ = start()
    prompts = [line.prompt(problem) for problem in line.problems[:3]]
    whole = sample_rollouts(line.policy, prompts, [2, 2, 2], (0, "test"), 10, 1.0, prompts_per_forward=3)
    chunked = sample_rollouts(line.policy, prompts, [2, 2, 2], (0, "test"), 10, 1.0, prompts_per_forward=1)
    more = sample_rollouts(line.policy, prompts, [4, 4, 4], (0, "test"), 10, 1.0, prompts_per_forward=2)
    assert [r.completion_ids for r in whole] == [r.completion_ids for r in chunked]
    assert [r.completion_ids for r in whole] == [more[place].completion_ids for place in (0, 1, 4, 5, 8, 9)]
    assert whole[0].completion_ids != whole[1].completion_ids


def test_what_a_step_says_early_is_what_it_samples(start):
    line, _ = start()
    prompts, heard = [line.prompt(problem) for problem in line.problems[:3]], []
    endless = sample_rollouts(line.policy, prompts, [8, 8, 8], (0, "early"), 40, 1.0, 2)
    line.policy.end, _ = Counter(token for rollout in endless for token in set(rollout.completion_ids)).most_common(1)[0]
    rollouts = sample_rollouts(line.policy, prompts, [8, 8, 8], (0, "early"), 40, 1.0, 2,
                               finished=lambda places, texts: heard.extend(zip(places, texts, strict=True)))
    assert heard and not Counter(heard) - Counter((rollout.group, rollout.text) for rollout in rollouts)


def test_the_sampler_agrees_with_the_gradient_forward(start):
    """pitfalls.md T2: merged weights, a cache and left padding may cost rounding, nothing more."""
    line, state = start()
    with torch.no_grad():
        for tensor in line.policy.adapter.state().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    line = dataclasses.replace(line, advantage=NoisyAdvantage())
    metrics = train_step(line, state)
    assert 0 < metrics["rollout/sampler_gap"] < 1e-4
    assert metrics["train/ratio"] == 1.0


def test_sampling_follows_the_distribution():
    distribution = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20000, 4)
    uniform = uniforms([("test",)], 20000)[0]
    counts = torch.bincount(inverse_transform(distribution, uniform), minlength=4) / 20000
    assert torch.allclose(counts, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015)
    edges = inverse_transform(torch.tensor([[0.0, 1.0, 0.0]]).expand(2, 3), torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [1, 1]  # never a token of zero probability


def test_groups_are_filled_up_to_their_size(start):
    line, _ = start()
    prompts = [line.prompt(problem) for problem in line.problems[:2]]
    taught = [Rollout(1, line.policy.encode(prompts[1]), (*line.policy.encode("pass"), line.policy.end), "pass", TEACHER)]
    rollouts = fill_groups(line.policy, prompts, [Seat(STUDENT, 1.0)] * 2, 3, taught, (0,), 6, 1.0, 8)
    assert [rollout.group for rollout in rollouts] == [0, 0, 0, 1, 1, 1]
    assert [rollout.source for rollout in rollouts].count(TEACHER) == 1


def test_a_loss_that_is_not_finite_stops_the_run(start):
    line, state = start()
    line = dataclasses.replace(line, advantage=Infinite())
    with pytest.raises(FloatingPointError, match=r"loss is (nan|-?inf) at step 0; lower optimizer.lr"):
        train_step(line, state)


def test_inner_steps_move_on_from_the_same_rollouts(start):
    once, many = (start("optimizer.warmup_steps=0", f"trainer.inner_steps={n}") for n in (1, 3))
    lengths = []
    for line, state in (once, many):
        line = dataclasses.replace(line, advantage=NoisyAdvantage())
        train_step(line, state)
        lengths.append(line.policy.adapter.fingerprint())
    assert lengths[0] != lengths[1]


def test_a_stale_basis_is_warned_about(start, caplog):
    line, state = start("arm=erase", "loophole=held_out", "mask_source.control=random", "mask_source.refresh_every=1")
    refresh(line, state)
    assert math.isnan(state.fit_overlap) and not caplog.records
    line = dataclasses.replace(line, mask_source=dataclasses.replace(line.mask_source, seed=1))  # another random basis
    refresh(line, state)
    assert state.fit_overlap < 0.2
    assert "the refitted basis shares" in caplog.text and "Lower mask_source.refresh_every" in caplog.text


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_pretrained_model_is_read_from_a_folder_and_asked_through_its_chat_template(config, sandbox, tmp_path):
    """The hub path, on a model folder that we make: load, chat template, two steps."""
    model, tokenizer = build.plan(config()).model.load()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plan = build.plan(config("model=qwen3_0_6b", f"model.path={tmp_path}", "model.device=cpu", "model.dtype=float32", "arm=erase"))
    policy = build.build_policy(plan)
    assert policy.decode(policy.encode_prompts(["sort ascending"])[0]) == "<user>sort ascending<assistant>"
    line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 1000), None)
    state = State(plan.optimizer.start(policy.adapter))
    for _ in range(2):
        train_step(line, state)
    assert state.step == 2
