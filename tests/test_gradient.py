"""Claims about per-rollout gradients: exact, from one backward, whatever the micro-batch (architecture.md §5, pitfalls.md T3)."""

from __future__ import annotations

import pytest
import torch

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.gradient import Keeping, PolicyLoss, rollout_gradients
from grpo_routing.parallel import ALONE, World
from grpo_routing.types import RolloutGrads, TokenBatch

ADAPTERS = ("lora", "svd", "mlp")


def some_tokens(policy, rows=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    top = policy.model.config.vocab_size

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(2, top, (length,), generator=generator).tolist())

    return TokenBatch.of([(draw(3, 7), draw(2, 9)) for _ in range(rows)], policy.pad)


def advantages_for(rows=6):
    return torch.tensor([0.5, -0.25, 0.0, 1.0, -1.25, 0.75], dtype=torch.float64)[:rows]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def textbook_gradient(policy, tokens, advantages, denominator):
    """Dr.GRPO from its formula with plain autograd: no wrappers of ours but the model's forward."""
    parameters = {name: list(module.values()) for name, module in policy.adapter.parameters().items()}
    logits = policy.model(input_ids=tokens.ids).logits[:, :-1]
    log_probs = torch.log_softmax(logits, -1).gather(2, tokens.ids[:, 1:, None]).squeeze(2)
    loss = -(advantages[:, None] * log_probs * tokens.completion_mask).sum() / denominator
    flat = [p.requires_grad_() for own in parameters.values() for p in own]
    grads = iter(torch.autograd.grad(loss, flat))
    return {name: torch.cat([next(grads).flatten() for _ in own]) for name, own in parameters.items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_summed_gradient_is_the_textbook_dr_grpo_backward(tiny_policy, adapter):
    policy = tiny_policy(adapter)
    tokens, advantages = some_tokens(policy), advantages_for()
    result = rollout_gradients(policy, tokens, advantages, PolicyLoss(0.2, 0.0, 100), micro_batch=4)
    expected = textbook_gradient(policy, tokens, advantages, 100)
    for name, gradient in result.grads[DEPLOYED].summed().items():
        assert relative(gradient, expected[name]) < 1e-12, name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_row_equals_its_rollouts_own_backward(tiny_policy, adapter):
    policy = tiny_policy(adapter)
    tokens, advantages = some_tokens(policy), advantages_for()
    rows = rollout_gradients(policy, tokens, advantages, PolicyLoss(0.2, 0.0, 100), micro_batch=6).grads[DEPLOYED].modules
    for row in range(6):
        alone = textbook_gradient(policy, tokens.rows([row]), advantages[[row]], 100)
        for name, expected in alone.items():
            if advantages[row] == 0:
                assert not rows[name][row].any()
            else:
                assert relative(rows[name][row], expected) < 1e-11, (name, row)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_the_micro_batch_size_changes_nothing(tiny_policy, adapter, kl_weight):
    policy = tiny_policy(adapter)
    tokens, advantages, loss = some_tokens(policy), advantages_for(), PolicyLoss(0.2, kl_weight, 100)
    whole = rollout_gradients(policy, tokens, advantages, loss, micro_batch=6)
    for size in (1, 2, 4, 5):
        parts = rollout_gradients(policy, tokens, advantages, loss, micro_batch=size)
        for name, expected in whole.grads[DEPLOYED].modules.items():
            assert relative(parts.grads[DEPLOYED].modules[name], expected) < 1e-11
        assert parts.loss == pytest.approx(whole.loss, rel=1e-11)


def test_single_precision_stays_within_a_millionth(tiny_policy):
    policy = tiny_policy("lora")
    policy.model.float()
    tokens, advantages, loss = some_tokens(policy), advantages_for().float(), PolicyLoss(0.2, 0.0, 100)
    whole = rollout_gradients(policy, tokens, advantages, loss, micro_batch=6).grads[DEPLOYED].summed()
    for size in (1, 2, 4):
        parts = rollout_gradients(policy, tokens, advantages, loss, micro_batch=size).grads[DEPLOYED].summed()
        assert all(relative(parts[name], whole[name]) < 1e-6 for name in whole)


def test_an_advantage_scales_its_row(tiny_policy):
    """g_i = A_i * g_i^unit with one inner step and no KL, so scores can be made independent of the advantage."""
    policy = tiny_policy("lora")
    tokens, loss = some_tokens(policy), PolicyLoss(0.2, 0.0, 100)
    unit = rollout_gradients(policy, tokens, torch.ones(6, dtype=torch.float64), loss, 6).grads[DEPLOYED].modules
    scaled = rollout_gradients(policy, tokens, advantages_for(), loss, 6).grads[DEPLOYED].modules
    for name, rows in scaled.items():
        assert relative(rows, advantages_for()[:, None] * unit[name]) < 1e-6, name


def test_both_knobs_of_the_svd_adapter_have_bitwise_equal_gradients(tiny_policy):
    """P11: on shared axes nothing but the projection tells the blocks apart."""
    policy = tiny_policy("svd")
    loss = -policy.log_probs(some_tokens(policy)).sum()
    loss.backward()
    for name, module in policy.adapter.parameters(DEPLOYED).items():
        assert torch.equal(module["dS"].grad, policy.adapter.parameters(QUARANTINE)[name]["dS"].grad)


def test_the_ratio_is_one_at_the_first_inner_step_and_clips_later(tiny_policy):
    """P16; and a second inner step with a moved policy is the clipped surrogate."""
    policy = tiny_policy("lora")
    tokens, advantages = some_tokens(policy), advantages_for()
    first = rollout_gradients(policy, tokens, advantages, PolicyLoss(0.2, 0.0, 100), 6)
    assert first.ratio == 1.0
    moved = torch.where(tokens.completion_mask, first.old_log_probs - 1.0, first.old_log_probs)  # ratio e, beyond the clip
    again = rollout_gradients(policy, tokens, advantages, PolicyLoss(0.2, 0.0, 100), 6, moved)
    for rows in again.grads[DEPLOYED].modules.values():
        assert not rows[advantages > 0].any()  # gain is capped: min(e A, 1.2 A) is constant
        assert rows[advantages < 0].any()  # a loss is not


def test_the_k3_penalty_pulls_towards_the_base_model(tiny_policy):
    policy = tiny_policy("lora")
    tokens, still = some_tokens(policy), torch.zeros(6, dtype=torch.float64)
    assert rollout_gradients(policy, tokens, still, PolicyLoss(0.2, 0.0, 100), 6).loss == 0.0
    result = rollout_gradients(policy, tokens, still, PolicyLoss(0.2, 0.5, 100), 6)
    gap = (policy.reference_log_probs(tokens) - policy.log_probs(tokens).detach())[tokens.completion_mask]
    expected = float((torch.exp(gap) - gap - 1).mean())
    assert result.kl == pytest.approx(expected) and result.kl > 0
    with torch.no_grad():
        for tensor in policy.adapter.state().values():
            tensor.zero_()
    assert rollout_gradients(policy, tokens, still, PolicyLoss(0.2, 0.5, 100), 6).kl == pytest.approx(0.0, abs=1e-12)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"completion_mask is \[2, 5\] but ids is \[2, 5\]; the mask must be one shorter"):
        TokenBatch(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="same number of rollouts"):
        RolloutGrads({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"got \[2, 3\]"):
        RolloutGrads({"a": torch.zeros(2, 3)}, own=torch.ones(3, dtype=torch.bool))


def test_of_several_processes_each_keeps_only_the_rows_that_it_computes():
    """Together they have what one process has; the rollouts without advantage are nowhere."""
    rows, active = torch.arange(12.0).view(6, 2), [0, 2, 3, 5]
    parts = []
    for rank in range(3):
        world = World(rank, 3)
        kept = Keeping({"m": 2}, torch.zeros(6), world, world.share(active))
        for row in reversed(world.share(active)):
            kept.add("m", [row], rows[[row]])
        parts.append(kept.result())
    assert [len(part.modules["m"]) for part in parts] == [1, 1, 2] and torch.equal(torch.stack([part.own for part in parts]).sum(0),
                                                                                  torch.tensor([1, 0, 1, 1, 0, 1]))
    assert torch.equal(torch.cat([part.modules["m"] for part in parts]), rows[active])
    alone = Keeping({"m": 2}, torch.zeros(6), ALONE, active)
    alone.add("m", active, rows[active])
    assert alone.result().own is None and torch.equal(alone.result().modules["m"][active], rows[active])
    assert not alone.result().modules["m"][[1, 4]].any()


def test_t_h1_padding_leaves_the_loss_as_it_is(tiny_policy):
    """baselines.md H5: twice the padding, the same loss and gradient."""
    policy = tiny_policy()
    tokens = some_tokens(policy)
    wide = TokenBatch(torch.nn.functional.pad(tokens.ids, (0, tokens.ids.shape[1]), value=policy.pad),
                      torch.nn.functional.pad(tokens.completion_mask, (0, tokens.ids.shape[1])))
    loss = PolicyLoss(0.2, 0.0, 100)
    narrow, padded = (rollout_gradients(policy, batch, advantages_for(), loss, 6) for batch in (tokens, wide))
    assert torch.allclose(narrow.losses, padded.losses, rtol=0, atol=1e-12)
    for name, rows in narrow.grads[DEPLOYED].modules.items():
        assert relative(padded.grads[DEPLOYED].modules[name], rows) < 1e-10


def test_t_h2_a_response_of_twice_the_length_has_twice_the_gradient():
    """baselines.md H5, on the loss itself: the sum over tokens is divided by a constant, never by a length."""
    loss = PolicyLoss(0.2, 0.0, 100)
    log_probs = torch.full((2, 8), -1.5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4 + [False] * 4, [True] * 8])
    value = loss(log_probs, log_probs.detach(), None, torch.tensor([0.5, 0.5], dtype=torch.float64), mask)
    value.sum().backward()
    short, long = log_probs.grad.sum(1).tolist()
    assert (short, long) == pytest.approx((-0.5 * 4 / 100, -0.5 * 8 / 100)) and long == pytest.approx(2 * short)


def test_t_h1_the_loss_itself_does_not_see_padding():
    """rollout_gradients cuts a batch to the width that it needs; here the padding reaches the loss, with log-probs that mean something."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(2, 8, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    wide = torch.nn.functional.pad(mask, (0, 4))
    loss, gains = PolicyLoss(0.2, 0.1, 100), torch.tensor([0.5, -1.0], dtype=torch.float64)
    old, reference = log_probs - 0.1, log_probs + 0.2
    narrow = loss(log_probs[:, :4], old[:, :4], reference[:, :4], gains, mask)
    assert torch.equal(loss(log_probs, old, reference, gains, wide), narrow) and narrow.all()


def test_t_h2_a_response_written_twice_has_twice_the_gradient_in_the_parameters():
    """A policy without context, so that both copies have the same log-probs: exactly 2."""
    loss, response, grads = PolicyLoss(0.2, 0.0, 100), torch.tensor([0, 2, 1, 2]), []
    for tokens in (response, torch.cat([response, response])):
        theta = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
        log_probs = torch.log_softmax(theta, 0)[tokens][None]
        gain, mask = torch.tensor([0.5], dtype=torch.float64), torch.ones_like(log_probs, dtype=torch.bool)
        loss(log_probs, log_probs.detach(), None, gain, mask).sum().backward()
        grads.append(theta.grad)
    assert torch.allclose(grads[1], 2 * grads[0], rtol=1e-14, atol=0) and grads[0].all()
