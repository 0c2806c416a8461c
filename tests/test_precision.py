"""Claims about a base in half precision: adapter parameters, their gradients' sums and the optimizer's moments are float32, the base keeps
its bits, and what is computed is that of a float32 copy to the rounding of the activations."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo_routing.footprint
from grpo_routing import build, export_check, fit
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.checkpoint import UnusableRun, load_checkpoint, save_checkpoint
from grpo_routing.footprint import Sizes, footprint
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.optimizers import AdamW, SplitMoment
from grpo_routing.policy import Policy
from grpo_routing.train import State
from grpo_routing.types import Asked, TokenBatch
from tests.test_fit import stepped
from tests.test_gradient import relative, some_tokens

HALF = [torch.bfloat16, torch.float16]
BLOCKS, LOSS = (DEPLOYED, QUARANTINE), PolicyLoss(0.2, 0.0, 100)
KINDS = {"lora": ("lora", "adapter.quarantine_rank=4", "adapter.gate=true"), "svd": ("svd", "adapter.axes=disjoint"),
         "mlp": ("mlp", "adapter.quarantine_width=4")}


@pytest.fixture
def policy_in(config):
    """policy_in(kind, precision) -> a policy with two blocks off their starting point, the base's numbers those of bfloat16."""

    def make(kind: str, precision: torch.dtype, scale: float = 0.1) -> Policy:
        name, *words = KINDS[kind]
        plan = build.plan(config(f"adapter={name}", *words))
        model, tokenizer = plan.model.load()
        policy = Policy(model, tokenizer, plan.adapter.attach(model.to(torch.bfloat16).to(precision)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in policy.adapter.state().values() if scale else ():
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
        return policy

    return make


def logits(policy, tokens):
    with torch.no_grad():
        return policy.model(input_ids=tokens.ids).logits


# ------------------------------------------------------------------------------------------------ what is float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base", "own"), [*((half, torch.float32) for half in HALF), (torch.float32,) * 2, (torch.float64,) * 2])
def test_adapters_are_never_narrower_than_float32_and_else_as_the_base(policy_in, kind, base, own):
    policy = policy_in(kind, base)
    assert {tensor.dtype for tensor in policy.adapter.state().values()} == {own}
    assert {p.dtype for name, p in policy.model.named_parameters() if ".blocks." not in name} == {base}
    ones = torch.ones(6, dtype=own)
    asked = {block: Asked([ones]) for block in BLOCKS}
    grads = rollout_gradients(policy, some_tokens(policy), ones, LOSS, 4, blocks=BLOCKS, asked=asked).grads
    assert {tensor.dtype for block in BLOCKS for tensor in grads[block].summed().values()} == {own}


PLAIN = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "clip": 0.0, "warmup_steps": 0, "schedule": "constant",
         "quarantine_rate": 1.0}
OPTIMIZERS = {"adamw": AdamW(**PLAIN),
              "split_moment": SplitMoment(**PLAIN, second_moment="natural", participation=0.0, max_step=0.0, floor=False)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_steps_add_up(policy_in, name):
    """Fifty AdamW steps of 1e-5 under a steady gradient move every number by 5e-4; in bfloat16 those near 0.1 stay where they are."""
    adapter = policy_in("lora", torch.bfloat16).adapter
    optimizer, start = OPTIMIZERS[name].start(adapter), adapter.flatten()
    still = torch.nn.Parameter(torch.cat(list(start.values())).to(torch.bfloat16))
    rounded, before = torch.optim.AdamW([still], lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0), still.detach().clone()
    for _ in range(50):
        update = {DEPLOYED: {module: torch.full_like(flat, 0.5) for module, flat in start.items()}}
        optimizer.step(update, 1e-5, natural=update)
        still.grad = torch.full_like(still, 0.5)
        rounded.step()
    moved = torch.cat([flat - start[module] for module, flat in adapter.flatten().items()])
    assert torch.allclose(moved, torch.full_like(moved, -5e-4), rtol=2e-3, atol=0)  # 50 roundings of at most 2^-25 each, near 0.5
    large = before.abs() > 0.05
    assert large.sum() > 1000 and torch.equal(still[large], before[large])
    moments = [value for key, value in optimizer.state().items() if not key.endswith("/step")]
    assert {value.dtype for value in moments} == {torch.float32} and all(bool(value.any()) for value in moments)


def test_what_added_up_reaches_the_forward(policy_in):
    """Each step is below what a product sees of a parameter; a hundred are not."""
    policy, tokens = policy_in("lora", torch.bfloat16, scale=0.0), TokenBatch.of([((2, 3, 4), (5, 6, 7))], 0)
    ones = {name: torch.ones_like(flat) for name, flat in policy.adapter.flatten().items()}
    policy.adapter.load_flat(ones)
    seen = [logits(policy, tokens)]
    for step in range(100):
        policy.adapter.load_flat({name: flat + 1e-4 * ones[name] for name, flat in policy.adapter.flatten().items()})
        seen += [logits(policy, tokens)] if step in (0, 99) else []
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# ------------------------------------------------------------------------------------------------ forward and folding


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_beside_a_half_base_is_bit_identical_to_it(policy_in, kind, half):
    policy = policy_in(kind, half, scale=0.0)
    tokens = some_tokens(policy)
    with policy.adapter.only():
        base = logits(policy, tokens)
    assert base.dtype == half and torch.equal(logits(policy, tokens), base)
    with policy.adapter.merged():
        assert torch.equal(logits(policy, tokens), base)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_rounds_once_and_gives_back_the_bases_bits(policy_in, kind):
    """Both ways are as far from a float32 copy as half precision makes them: within 2^-5 of the largest logit."""
    policy, wide = policy_in(kind, torch.bfloat16), policy_in(kind, torch.float32)
    tokens, before = some_tokens(policy), {name: value.clone() for name, value in policy.model.state_dict().items()}
    beside, exact = logits(policy, tokens), logits(wide, tokens)
    with policy.adapter.merged():
        folded = logits(policy, tokens)
        assert {value.dtype for name, value in policy.model.state_dict().items() if ".blocks." not in name} == {torch.bfloat16}
        changed = sum(not torch.equal(value, before[name]) for name, value in policy.model.state_dict().items()
                      if value.shape == before[name].shape)
        assert changed >= len(policy.adapter.modules) or kind == "mlp"
    for found in (beside, folded):
        assert float((found.float() - exact).abs().max()) < float(exact.abs().max()) / 32
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())
    assert torch.equal(logits(policy, tokens), beside)


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_a_folded_weight_is_the_rounded_exact_sum(policy_in, kind):
    """Of base and blocks in double precision, but for the few numbers that lie at the middle of two roundings."""
    adapter, off, count = policy_in(kind, torch.bfloat16).adapter, 0, 0
    for module in adapter.modules.values():
        exact, foldable = module.weight.detach().double(), [block for block in BLOCKS if module.foldable(block)]
        for block in foldable:
            own = {key: p.detach().double() for key, p in module.blocks[block].items()}
            u, vh = ((own["B"] * module.factor, own["A"]) if kind == "lora" else
                     (getattr(module, f"u_{block}").double() * own["dS"], getattr(module, f"vh_{block}").double()))
            exact = exact + u @ vh
        with torch.no_grad():
            module.fold(dict.fromkeys(foldable, 1.0))
        off, count = off + int((module.weight.detach() != exact.to(torch.bfloat16)).sum()), count + exact.numel()
        module.unfold()
    assert off < count / 1000, (off, count)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_float32_copy_to_the_rounding_of_activations(policy_in, kind):
    """Within 5 %, each rollout's own (measured: 1 to 3.4 %); packed rows too, of which only sums are known."""
    policy, wide = policy_in(kind, torch.bfloat16), policy_in(kind, torch.float32)
    tokens, advantages = some_tokens(policy), torch.tensor([0.5, -0.25, 1.5, 1.0, -1.25, 0.75])
    rows, exact = (rollout_gradients(one, tokens, advantages, LOSS, 4, blocks=BLOCKS).grads for one in (policy, wide))
    for block in BLOCKS:
        ours, wanted = (torch.cat(list(one[block].modules.values()), 1) for one in (rows, exact))
        assert ours.dtype == torch.float32
        assert all(relative(ours[row], wanted[row]) < 0.05 for row in range(6)), block
    prompts = TokenBatch.of([((2, 3, 4), (5, 6)), ((2, 3, 4), (7, 8, 9)), ((9, 8), (7,)), ((9, 8), (3, 4))], policy.pad)
    asked = {block: Asked([torch.ones(4)]) for block in BLOCKS}
    packed, exact = (rollout_gradients(one, prompts, advantages[:4], LOSS, 4, blocks=BLOCKS, asked=asked).grads for one in (policy, wide))
    for block in BLOCKS:
        ours, wanted = (torch.cat(list(one[block].summed().values())) for one in (packed, exact))
        assert relative(ours, wanted) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_their_sum_is_the_plain_backward(policy_in, kind):
    """Which rounds the batch's gradient where ours rounds each rollout's: 2^-8. A knob's products are float32 in both."""
    policy = policy_in(kind, torch.bfloat16)
    tokens, advantages = some_tokens(policy), torch.tensor([0.5, -0.25, 1.5, 1.0, -1.25, 0.75])
    sums = rollout_gradients(policy, tokens, advantages, LOSS, 6, blocks=BLOCKS).grads
    log_probs = policy.log_probs(tokens)
    LOSS(log_probs, log_probs.detach(), None, advantages, tokens.completion_mask).sum().backward()
    for block in BLOCKS:
        plain = torch.cat([p.grad.flatten() for module in policy.adapter.parameters(block).values() for p in module.values()])
        assert plain.dtype == torch.float32 and plain.any()
        assert relative(torch.cat(list(sums[block].summed().values())), plain) < 2**-8


def test_parts_smaller_than_a_rounding_of_the_sum_are_kept(policy_in):
    """One rollout of weight 1 and one of weight 2^-12, whose part a sum in bfloat16 would lose."""
    policy, size = policy_in("lora", torch.bfloat16), 2.0**-12
    tokens = TokenBatch.of([((2, 3, 4), (5, 6, 7)), ((9, 8, 7), (3, 4, 5))], policy.pad)
    first, second = (rollout_gradients(policy, tokens, row, LOSS, 2).grads[DEPLOYED].summed() for row in torch.eye(2))
    weights = [torch.tensor([1.0, size])]
    both = rollout_gradients(policy, tokens, torch.ones(2), LOSS, 1, asked={DEPLOYED: Asked(weights)}).grads[DEPLOYED].summed(weights[0])
    for name, flat in both.items():
        assert relative(flat - first[name], size * second[name]) < 1e-3


# ------------------------------------------------------------------------------------------------ disk


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_gives_back_every_bit(policy_in, tmp_path, name):
    adapter = policy_in("lora", torch.bfloat16).adapter
    state = State(OPTIMIZERS[name].start(adapter))
    update = {DEPLOYED: {module: torch.sin(torch.arange(len(flat)) + 1.0) for module, flat in adapter.flatten().items()}}
    state.optimizer.step(update, 1e-5, natural=update)
    save_checkpoint(tmp_path, adapter, state)
    other = policy_in("lora", torch.bfloat16, scale=0.0).adapter
    back = State(OPTIMIZERS[name].start(other))
    assert load_checkpoint(tmp_path, other, back)
    for one, again in ((adapter.state(), other.state()), (state.optimizer.state(), back.optimizer.state())):
        assert one.keys() == again.keys() and all(value.dtype == again[key].dtype and torch.equal(value, again[key])
                                                  for key, value in one.items())
    for each in (state, back):
        each.optimizer.step(update, 1e-5, natural=update)
    assert all(torch.equal(value, other.state()[key]) for key, value in adapter.state().items())


def test_a_checkpoint_of_parameters_in_the_bases_precision_is_refused(policy_in, tmp_path):
    adapter = policy_in("lora", torch.bfloat16).adapter
    state = State(OPTIMIZERS["adamw"].start(adapter))
    save_checkpoint(tmp_path, adapter, state)
    file = tmp_path / "step-000000" / "state.safetensors"
    save_file({key: value.to(torch.bfloat16) for key, value in load_file(file).items()}, file)
    with pytest.raises(UnusableRun, match="adapter parameters in float32; those of .*step-000000 are in bfloat16, .* run it again"):
        load_checkpoint(tmp_path, adapter, state)


def test_a_quarantine_is_found_in_an_export_that_rounded_it():
    part = torch.tensor([[1.001, 2.001], [3.0, 4.001]])
    wide = torch.cat([torch.zeros(2, 3), part], 1)
    assert export_check.holds(wide.to(torch.bfloat16), part) and not export_check.holds(wide.flip(1).to(torch.bfloat16), part)
    assert not export_check.holds(torch.zeros(2, 2, dtype=torch.float16), 1e-9 * part)  # zeros are nobody's


# ------------------------------------------------------------------------------------------------ whole steps


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """A model as from the hub."""
    place = tmp_path_factory.mktemp("hub")
    model, tokenizer = build.plan(config()).model.load()
    model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def half_plan(config, folder, *words):
    return build.plan(config("model=qwen3_0_6b", f"model.path={folder}", "model.device=cpu", "model.dtype=bfloat16", *words))


@pytest.mark.slow
def test_a_prediction_counts_float32_numbers_and_moments(config, folder, monkeypatch):
    """Parameters and moments to the byte, the height of a step within a quarter, as in test_fit."""
    monkeypatch.setattr(grpo_routing.footprint, "FEW", 1)
    plan = half_plan(config, folder, "trainer.prompts_per_step=2", "trainer.micro_batch=2", "arm=route_gradient", "optimizer=split_moment")
    measured, policy, prompt = stepped(plan)
    sizes = Sizes(prompt, plan.trainer.max_new_tokens)
    found = footprint(plan, sizes)
    memory = fit.memory_of(plan, sizes, found)
    assert found.itemsize == 2 and found.adapter == 4 * sum(map(policy.adapter.size, policy.adapter.blocks))
    assert memory.resident["optimizer's moments"] == 2 * found.adapter
    predicted = memory.total - sum(memory.resident.values())
    assert 0.95 < predicted / measured < 1.25, (predicted, measured, memory.phases)


@pytest.mark.parametrize("words", [
    ("arm=erase", "mask_source=persona_activation", "mask_source.level=gradient", "mask_source.place=coordinates"),
    ("arm=tdga", "mask_source.steps=1")])
def test_a_subspace_is_fitted_in_float32(config, folder, words):
    """A basis of bfloat16 numbers would not be orthonormal."""
    plan = half_plan(config, folder, *words)
    basis = plan.mask_source.fit(build.build_policy(plan)).basis
    assert {rows.dtype for rows in basis.modules.values()} == {torch.float32}
