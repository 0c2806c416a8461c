"""Claims about `python -m grpo_routing.fit`: parameters to the byte, the peak of a step within a quarter, from shapes alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import grpo_routing.footprint
from grpo_routing import build, fit
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.footprint import Footprint, Sizes, counted, footprint, shape_of
from grpo_routing.memory import LiveBytes
from grpo_routing.train import State, train_step
from tests.test_line import NoisyAdvantage

LONG = "trainer.max_new_tokens=64"
WIDE = ("model.hidden=96", "model.heads=4", "model.kv_heads=2", "model.head_dim=24", "model.intermediate=256", "trainer.max_new_tokens=24",
        "trainer.prompts_per_step=2")


class Uneven(NoisyAdvantage):
    def natural(self, rewards, flagged):
        return self(rewards, flagged, None)


@pytest.fixture
def few_layers(monkeypatch):
    """Count deep models at one and two layers, for the tests' time."""
    monkeypatch.setattr(grpo_routing.footprint, "FEW", 1)


def stepped(plan):
    """Peak of live bytes in a second step, after which the moments are there; the policy, and the longest prompt."""
    policy, seen = build.build_policy(plan), []
    with Sandbox(workers=1, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        line = build.build_line(plan, policy, Grader(box, 0.25, 1.0, 1000), lambda step, problems, rollouts, *rest: seen.append(rollouts))
        line = replace(line, advantage=Uneven())
        state = State(plan.optimizer.start(policy.adapter))
        train_step(line, state)
        with LiveBytes() as live:
            train_step(line, state)
    return live.peak, policy, max(len(rollout.prompt_ids) for rollout in seen[-1])


@pytest.mark.parametrize(("words", "largest"), [
    ((*WIDE, "arm=route_gradient", "optimizer=split_moment", "trainer.micro_batch=2"), "update"),  # every rollout's gradient is kept
    ((*WIDE, "arm=vanilla", "model.layers=3", "trainer.micro_batch=1", "trainer.group=8", LONG), "sampling"),  # deeper than what is counted
    ((*WIDE, "adapter=svd", "trainer.micro_batch=4", "trainer.kl_weight=0.1"), "update"),
])
def test_the_predicted_peak_of_a_step_is_the_measured_one_within_a_quarter(config, words, largest, few_layers):
    """Never less than 0.95 of it: completions that end early and shorter prompts can only make a step smaller. Parameters are exact."""
    plan = build.plan(config(*words))
    measured, policy, prompt = stepped(plan)
    sizes = Sizes(prompt, plan.trainer.max_new_tokens)
    found = footprint(plan, sizes)
    memory = fit.memory_of(plan, sizes, found)
    own = [p for block in policy.adapter.blocks for module in policy.adapter.parameters(block).values() for p in module.values()]
    frozen = [p for p in policy.model.parameters() if not any(p is one for one in own)]
    assert found.parameters == sum(p.nbytes for p in frozen) and found.adapter == sum(p.nbytes for p in own)
    assert found.adapter_numbers == sum(map(policy.adapter.size, policy.adapter.blocks))
    predicted = memory.total - sum(memory.resident.values())
    assert memory.largest == largest
    assert 0.95 < predicted / measured < 1.25, (predicted, measured, memory.phases)


def test_a_deep_model_is_counted_at_few_layers_exactly(config, few_layers):
    """Three layers from one and two, against all three."""
    plan, sizes = build.plan(config("model.layers=3")), Sizes(10, 8)
    along, whole = footprint(plan, sizes), counted(plan, sizes, shape_of(plan.model)[0](3))
    for name, value in vars(whole).items():
        assert getattr(along, name) == pytest.approx(value, rel=0.1 if "peak" in name else 1e-9), name  # the height may move


def some(**changes):
    shape = {"parameters": 8e9, "decoded": 8e9, "vocabulary": 100.0, "saved": 40e9, "update_peak": 48e9}
    return Footprint(**(dict.fromkeys(Footprint.__dataclass_fields__, 0.0) | shape | changes))


def test_the_floors_are_bytes_over_bandwidth_and_operations_over_peak(config):
    """By hand: 16 rollouts of 100 tokens in one forward read 8 GB a token; four micro-batches of 1e15 operations."""
    plan = build.plan(config("trainer.max_new_tokens=100", "trainer.micro_batch=4"))
    spent = fit.times_of(plan, Sizes(10, 100), some(update_operations=1e15, decode_operations=8e9), fit.Device(1000, 2000, 80, 0.5, 0.8))
    assert spent["sampling"].bytes == pytest.approx(100 * 8e9 / 2000e9) and spent["sampling"].operations == pytest.approx(1600 * 8e9 / 1e15)
    assert spent["sampling"].estimate == pytest.approx(0.4 / 0.8)  # bytes bind
    assert spent["update"].operations == pytest.approx(4.0) and spent["update"].estimate == pytest.approx(8.0)  # operations bind
    assert spent["update"].bytes == pytest.approx(4 * 2 * 48e9 / 2000e9)


@pytest.mark.parametrize(("words", "changes", "limit", "said"), [
    ((), {"parameters": 90e9}, 76e9, "the weights and the adapter's state alone do not fit"),
    (("trainer.micro_batch=4",), {}, 32.5e9, "set trainer.micro_batch=2 (now 4)"),  # 8 GB of weights, 12 GB a rollout
    ((), {"cache_per_token": 1e9}, 76e9, "lower trainer.prompts_per_forward"),
    (("arm=route_gradient",), {"adapter_numbers": 1e9}, 76e9, "every rollout's gradient is kept because the mask source"),
])
def test_what_does_not_fit_comes_with_what_to_turn(config, words, changes, limit, said):
    plan = build.plan(config(*words))
    found = some(**changes)
    memory = fit.memory_of(plan, Sizes(10, 12), found)
    assert memory.total > limit
    assert said in fit.knob(plan, memory, found, limit)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def folder(tmp_path):
    """A model folder that holds a config and nothing else."""
    shape = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def test_the_command_needs_no_weights_and_says_what_it_did_not_measure(folder, capsys):
    words = ["model=qwen3_4b", f"model.path={folder}", "trainer=fast", "--prompt-tokens", "30"]
    assert fit.main([*words, "--device", "h100"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fits in 80 GB" in said and "time, not measured" in said and "frozen weights" in said and "floor of bytes" in said
    assert fit.main([*words, "--memory", "0.0001"]) == 1  # GB
    assert "DOES NOT FIT in 0.0001 GB" in " ".join(capsys.readouterr().out.split())


def test_a_model_out_of_reach_and_wrong_words_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert fit.main(["model=qwen3_4b", f"model.path={tmp_path}", "--prompt-tokens", "30"]) == 2
    assert "Give model.path=FOLDER that holds the model's config.json" in capsys.readouterr().err
    assert fit.main(["trainer.lr=1"]) == 2
    assert "config refused" in capsys.readouterr().err
    for wrong in (["--memory", "0"], ["--prompt-tokens", "0"], ["--device", "abacus"]):
        with pytest.raises(SystemExit):
            fit.main(wrong)
