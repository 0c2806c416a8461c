"""The written-out decode step is transformers' forward: same logits, any order of leaving, any adapter; and it stands aside for hooks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grpo_routing import decoder as module
from grpo_routing.decoder import Cached, Repeated, Shared, decoder, shareable
from grpo_routing.rollout import uniforms

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=12)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),  # with biases, without norms of query and key
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "linear rope": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=LINEAR)),
}
PROMPTS = ((3, 4, 5, 6, 7), (8, 9), (10, 11, 12))


def prefilled(model) -> tuple:
    width = max(map(len, PROMPTS))
    ids, mask = torch.zeros(len(PROMPTS), width, dtype=torch.long), torch.zeros(len(PROMPTS), width, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    output = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
    return output.past_key_values, mask


@torch.inference_mode()
def walk(model, kind: type, counts: list[int], leaving: dict[int, list[int]], steps: int = 6) -> list[torch.Tensor]:
    """Logits of every step; `leaving` says which places stay after a step."""
    groups = torch.arange(len(PROMPTS)).repeat_interleave(torch.tensor(counts))
    rows = kind(model, *prefilled(model), groups, steps)
    tokens, found = torch.randint(0, 50, (len(groups), steps), generator=torch.Generator().manual_seed(0)), []
    for step in range(steps):
        found.append(rows.next(tokens[:, step]))
        if step in leaving:
            going = torch.tensor(leaving[step])
            rows.keep(going)
            tokens = tokens[going]
    return found


@pytest.mark.parametrize("kind", [Repeated, Shared])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("counts", "leaving"), [
    ([2, 2, 2], {}), ([1, 3, 2], {}), ([3, 1, 2], {1: [0, 2, 3, 4], 3: [1, 3]}),  # at last nobody continues the first prompt's second row
    ([4, 0, 1], {0: [4], 2: [0]})])
def test_logits_are_those_of_transformers(name, kind, counts, leaving):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    assert shareable(model)
    for own, expected in zip(walk(model, kind, counts, leaving), walk(model, Cached, counts, leaving), strict=True):
        assert float((own - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(("short", "small"), [(0, 0), (64, 1 << 20)])
@pytest.mark.parametrize("adapter", ["lora", "svd", "mlp"])
def test_an_adapter_takes_part_and_rollouts_are_the_same(tiny_policy, adapter, short, small, monkeypatch):
    monkeypatch.setattr(module, "SHORT", short)
    monkeypatch.setattr(module, "SMALL", small)
    policy = tiny_policy(adapter)
    noise = uniforms([("decoder", row) for row in range(9)], 12)
    prompts = [(5, 6, 7, 8), (9, 10), (11,)]

    def sampled(temperature: float) -> list:
        return policy.sample(prompts, [4, 3, 2], noise, temperature)

    own = {temperature: sampled(temperature) for temperature in (1.0, 0.7)}
    assert shareable(policy.model)
    monkeypatch.setattr(module, "shareable", lambda model: False)
    for temperature, rows in own.items():
        for (ids, log_probs), (expected, theirs) in zip(rows, sampled(temperature), strict=True):
            assert ids == expected and log_probs == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("short", [0, 64])
def test_a_row_ends_at_its_end_whenever_the_others_do(tiny_policy, short, monkeypatch):
    """Rows do not know of each other: what ends early is the beginning of what would never end."""
    monkeypatch.setattr(module, "SHORT", short)
    policy = tiny_policy("lora")
    noise, prompts, counts = uniforms([("ends", row) for row in range(40)], 40), [(5, 6, 7, 8), (9, 10), (11,)], [20, 12, 8]
    policy.end = -1
    endless = policy.sample(prompts, counts, noise, 0.3)
    assert {len(ids) for ids, _ in endless} == {40}
    said = Counter(token for ids, _ in endless for token in set(ids))
    policy.end, _ = said.most_common(1)[0]
    lengths = [(*ids, policy.end).index(policy.end) + 1 for ids, _ in endless]
    assert len(set(lengths)) > 5, "rows end at many different steps"
    left: dict[int, tuple[int, ...]] = {}
    found = policy.sample(prompts, counts, noise, 0.3, lambda rows, completions: left.update(zip(rows, completions, strict=True)))
    for (ids, log_probs), (whole, theirs), length in zip(found, endless, lengths, strict=True):
        assert ids == whole[:length] and log_probs == pytest.approx(theirs[:length], abs=1e-5)
    assert len(left) >= 10 and left == {row: found[row][0] for row in left}, "what is heard early is what is returned"


def test_the_kind_goes_by_the_prompts_and_the_architecture(monkeypatch):
    model, groups = MODELS["qwen3"]().eval(), torch.tensor([0, 1])
    with torch.inference_mode():
        assert isinstance(decoder(model, *prefilled(model), groups, 3), Repeated)
        monkeypatch.setattr(module, "SHORT", 4)
        assert isinstance(decoder(model, *prefilled(model), groups, 3), Shared)
        model.config.model_type = "strange"
        assert isinstance(decoder(model, *prefilled(model), groups, 3), Cached)


def test_it_stands_aside_for_hooks_and_for_shapes_that_it_does_not_know():
    model = MODELS["qwen3"]().eval()
    assert shareable(model)
    handle = model.get_decoder().layers[1].register_forward_hook(lambda *_: None)
    assert not shareable(model)
    handle.remove()
    assert shareable(model)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert model.get_decoder().layers[1]._forward_hooks, "transformers leaves its own behind"
    assert shareable(model)
    for change in ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {"rope_parameters": {
            "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}):
        assert not shareable(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **change)))
