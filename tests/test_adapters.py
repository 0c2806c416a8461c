"""Claims about the adapters: identity at the start, exact merging, exact ablation, honest caches."""

from __future__ import annotations

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.adapters.svd import decompose
from tests.test_gradient import ADAPTERS, some_tokens


def logits(policy, tokens):
    with torch.no_grad():
        return policy.model(input_ids=tokens.ids).logits


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fresh_adapter_is_bit_identical_to_the_base(config, adapter):
    plan = build.plan(config(f"adapter={adapter}"))
    model, tokenizer = plan.model.load()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        policy = build.Policy(model, tokenizer, plan.adapter.attach(model))
        assert torch.equal(policy.model(input_ids=ids).logits, before)
        with policy.adapter.merged():
            assert torch.equal(policy.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merging_gives_the_same_policy_and_restores_the_weights_bit_for_bit(tiny_policy, adapter):
    policy = tiny_policy(adapter)
    tokens = some_tokens(policy)
    live, weights = logits(policy, tokens), {key: value.clone() for key, value in policy.model.state_dict().items()}
    with policy.adapter.merged():
        assert torch.allclose(logits(policy, tokens), live, rtol=1e-10, atol=1e-12)
        now = policy.model.state_dict()
        changed = [key for key, value in weights.items() if now[key].shape != value.shape or (now[key] != value).any()]
        assert len(changed) >= len(policy.adapter.modules)  # the branches are in the weights, not beside them
    assert all(torch.equal(value, weights[key]) for key, value in policy.model.state_dict().items())
    assert torch.equal(logits(policy, tokens), live)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_all_blocks_off_the_reference_is_the_base(config, tiny_policy, adapter):
    policy = tiny_policy(adapter)
    base, _ = build.plan(config()).model.load()
    tokens = some_tokens(policy)
    with policy.adapter.only(), torch.no_grad():
        assert torch.equal(logits(policy, tokens), base.double()(input_ids=tokens.ids).logits)


def test_ablating_the_quarantine_bites_only_once_it_has_moved(tiny_policy):
    policy = tiny_policy("svd")
    tokens = some_tokens(policy)
    both = logits(policy, tokens)
    with policy.adapter.only(DEPLOYED):
        assert not torch.allclose(logits(policy, tokens), both)
        with policy.adapter.merged():
            merged = logits(policy, tokens)
    with torch.no_grad():
        for module in policy.adapter.parameters(QUARANTINE).values():
            module["dS"].zero_()
    deployed = logits(policy, tokens)
    assert torch.allclose(merged, deployed, rtol=1e-10, atol=1e-12)
    with policy.adapter.only(DEPLOYED):
        assert torch.equal(logits(policy, tokens), deployed)


def test_flatten_and_load_flat_are_inverse(tiny_policy):
    policy = tiny_policy("lora")
    flat = policy.adapter.flatten()
    policy.adapter.load_flat({name: vector + 1 for name, vector in flat.items()})
    assert all(torch.equal(now, flat[name] + 1) for name, now in policy.adapter.flatten().items())


def test_the_decomposition_reconstructs_the_weight_and_is_cached_by_its_content(tmp_path):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    u, vh = decompose(weight, tmp_path)
    singular = torch.linalg.svdvals(weight)
    assert torch.allclose((u * singular) @ vh, weight, atol=1e-5)
    (file,) = tmp_path.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    again, _ = decompose(weight.clone(), tmp_path)
    assert torch.equal(again, u) and file.stat().st_mtime_ns == before
    decompose(weight + 1, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_every_target_linear_is_wrapped_and_nothing_else_trains(tiny_policy):
    policy = tiny_policy("lora")
    names = {name.rsplit(".", 1)[-1] for name in policy.adapter.modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(".blocks." in name for name in trained)
    assert sum(p.numel() for p in policy.model.parameters() if p.requires_grad) == policy.adapter.size()


def test_too_high_a_rank_is_refused(config):
    plan = build.plan(config("adapter=svd", "adapter.rank=1000"))
    with pytest.raises(ValueError, match=r"adapter.rank is 1000 but .* has \d+ singular directions; use 0 for all"):
        build.build_policy(plan)


def test_a_state_that_does_not_fit_is_refused(tiny_policy):
    with pytest.raises(ValueError, match="adapter state does not fit"):
        tiny_policy("lora").adapter.load_state(tiny_policy("svd").adapter.state())
