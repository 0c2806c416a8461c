"""Claims about two blocks: what a label does to each, forward and backward, through one step of the line.

P-numbers are the property tests of routing.md §4.5, T-numbers those of graft.md §6.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, Adapter
from grpo_routing.adapters.lora import Lora
from grpo_routing.decision import decide, differentiate, natural, summed
from grpo_routing.env.grader import Grade
from grpo_routing.gradient import Forward, PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.view import StepView
from grpo_routing.projections.route import Route
from grpo_routing.projections.stop_gradient import StopGradient
from grpo_routing.rollout import Seat, fill_groups, sample_rollouts
from grpo_routing.train import State, batch_of, seats, train_step
from grpo_routing.types import ANCHOR, STUDENT, Asked, Labels, TokenBatch, Weights
from tests.test_gradient import advantages_for, relative, some_tokens

F64 = torch.float64
BLOCKS = (DEPLOYED, QUARANTINE)
KINDS = {
    "lora": ("lora", "adapter.rank=4", "adapter.quarantine_rank=3"),
    "gated": ("lora", "adapter.rank=4", "adapter.quarantine_rank=3", "adapter.gate=true"),
    "mlp": ("mlp", "adapter.width=6", "adapter.quarantine_width=5"),
    "svd": ("svd", "adapter.axes=disjoint", "adapter.every=3"),
}
Z = 100
SINGLE = 1e-6  # the model's RMSNorm rounds in single precision, so a factor on the loss is not one on the gradient
FLAGGED = torch.tensor([1, 0, 0, 1, 1, 0], dtype=F64)
CLASSIC = {"mode": "classic", "alpha": 1.0, "strength": 1.0, "kappa": 1.0, "clean": (1.0, 1.0), "flagged": (0.0, 1.0), "forward": "on",
           "clean_share": 0.25}


def route(**change) -> Route:
    return Route(**CLASSIC | change)


@pytest.fixture
def both(tiny_policy):
    """both(kind) -> a policy in float64 whose two blocks are off their starting point."""
    return lambda kind: tiny_policy(*KINDS[kind])


def gradients(policy, advantages, micro_batch=6, tokens=None, **how):
    return rollout_gradients(policy, tokens or some_tokens(policy), advantages, PolicyLoss(0.2, 0.0, Z), micro_batch, None, BLOCKS,
                             Forward(**how))


def autograd(policy, advantages, tokens=None) -> dict[str, dict[str, torch.Tensor]]:
    """The same sums from one plain backward on the parameters themselves: block -> module -> [D]."""
    tokens = tokens or some_tokens(policy)
    log_probs = policy.log_probs(tokens)
    loss = -(advantages[:, None] * log_probs).sum() / Z
    leaves = {block: {name: list(m.values()) for name, m in policy.adapter.parameters(block).items()} for block in policy.adapter.blocks}
    flat = [p for own in leaves.values() for module in own.values() for p in module]
    found = iter(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    return {block: {name: torch.cat([next(found).flatten() for _ in module]) for name, module in own.items()}
            for block, own in leaves.items()}


def close(ours, expected, bound=1e-12):
    return all(relative(ours[name], expected[name]) <= bound for name in expected)


# ---------------------------------------------------------------------------------------------- P1-P8: masks, hand-made batches


@pytest.mark.parametrize("kind", KINDS)
def test_p1_no_mask_changes_the_forward(both, kind):
    """Plain, parameter-masked (per-rollout leaves) and stop-gradient forms give the same bits, for any hard mask."""
    policy = both(kind)
    tokens = some_tokens(policy)
    plain = policy.log_probs(tokens).detach()
    masks = [FLAGGED, 1 - FLAGGED, torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64)]
    for passes in [None, *({DEPLOYED: mask} for mask in masks), {DEPLOYED: FLAGGED, QUARANTINE: 1 - FLAGGED}]:
        for at in ("output", "bottleneck"):
            for quarantine in (None, torch.ones(6, dtype=F64)):
                with policy.adapter.per_rollout(6, BLOCKS, quarantine, passes, at):
                    assert torch.equal(policy.log_probs(tokens), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_p2_nothing_reaches_the_deployed_block_when_all_are_flagged(both, kind):
    policy, advantages, ones = both(kind), advantages_for(), torch.ones(6, dtype=F64)
    weights = route().weights(Labels.of(ones), ones, policy.adapter, 6)
    masked = gradients(policy, advantages).grads[DEPLOYED].summed(weights.deployed)
    stopped = gradients(policy, advantages, passes={DEPLOYED: 1 - ones}).grads[DEPLOYED].summed()
    assert not any(g.any() for g in [*masked.values(), *stopped.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_p3_p4_the_issues_claim_parameter_masking_leaves_lower_layers_alone_and_stop_gradient_does_not(both, kind):
    """A flagged batch teaches the quarantine exactly what unmasked training would (P3); activation stop-gradient removes the
    deployed branch's Jacobian, so all but the last adapted module learn something else (P4)."""
    policy, advantages, ones = both(kind), advantages_for(), torch.ones(6, dtype=F64)
    unmasked = autograd(policy, advantages)[QUARANTINE]
    weights = route().weights(Labels.of(ones), ones, policy.adapter, 6)
    masked = gradients(policy, advantages).grads[QUARANTINE].summed(weights.quarantine)
    stopped = gradients(policy, advantages, passes={DEPLOYED: 1 - ones}).grads[QUARANTINE].summed()
    *lower, last = policy.adapter.modules  # in the model's order: what comes last has no adapted module above it
    assert close(masked, unmasked)
    assert torch.equal(stopped[last], masked[last])
    assert relative(stopped[lower[0]], masked[lower[0]]) > 1e-3
    assert sum(relative(stopped[name], masked[name]) > 1e-6 for name in lower) >= len(lower) - 2  # one parallel to the last may be equal


@pytest.mark.parametrize("kind", ["lora", "mlp"])
def test_p5_a_stop_at_the_bottleneck_leaks_into_the_second_half(both, kind):
    policy, ones = both(kind), torch.ones(6, dtype=F64)
    rows = gradients(policy, advantages_for(), passes={DEPLOYED: 1 - ones}, stop_at="bottleneck").grads[DEPLOYED].summed()
    for name, module in policy.adapter.parameters(DEPLOYED).items():
        parts = dict(zip(module, rows[name].split([p.numel() for p in module.values()])))
        second = parts.pop({"lora": "B", "mlp": "down"}[kind])
        assert second.any() and parts and not any(part.any() for part in parts.values()), name


@pytest.mark.parametrize("kind", KINDS)
def test_p6_t39_mixed_labels_in_one_pass_are_a_backward_for_each_class(both, kind):
    """Clean, flagged and quarantine-off rollouts of one batch, with GRAFT's weights, against plain backward passes on the
    parameters, one for each class, whose gradients tensor hooks scale."""
    policy, advantages = both(kind), torch.tensor([0.5, -0.25, 0.3, 1.0, -1.25, 0.75], dtype=F64)
    tokens = some_tokens(policy)
    flags, off = torch.tensor([1, 0, 0, 1, 0, 1], dtype=F64), torch.tensor([0, 0, 1, 0, 1, 1], dtype=torch.bool)
    scale = (~off).to(F64)
    weights = route(kappa=2.0).weights(Labels.of(flags), scale, policy.adapter, 6)
    result = gradients(policy, advantages, tokens=tokens, quarantine=scale)
    ours = {block: result.grads[block].summed(weights.of(block)) for block in BLOCKS}
    classes = {(1.0, 1.0): ~off & (flags == 0), (0.0, 2.0): ~off & (flags == 1), (1.0, 0.0): off & (flags == 0)}  # off and flagged: none
    expected = {block: {name: torch.zeros_like(flat) for name, flat in policy.adapter.flatten(block).items()} for block in BLOCKS}
    for (deployed, quarantine), rows in classes.items():
        handles = [p.register_hook(lambda g, w=w: w * g) for block, w in ((DEPLOYED, deployed), (QUARANTINE, quarantine))
                   for module in policy.adapter.parameters(block).values() for p in module.values()]
        with policy.adapter.scaled({QUARANTINE: float(scale[rows][0])}):
            part = autograd(policy, torch.where(rows, advantages, 0.0), tokens)
        for handle in handles:
            handle.remove()
        for block in BLOCKS:  # hooks on leaves act on what autograd.grad returns
            expected[block] = {name: expected[block][name] + flat for name, flat in part[block].items()}
    for block in BLOCKS:
        assert close(ours[block], expected[block], 1e-11), block
    assert not close(ours[DEPLOYED], autograd(policy, advantages, tokens)[DEPLOYED], 1e-2)


@pytest.mark.parametrize("kind", ["lora", "gated", "mlp"])
def test_p7_with_the_quarantine_off_the_model_is_one_that_was_built_without_it(both, tiny_policy, kind):
    policy, advantages, off = both(kind), advantages_for(), torch.zeros(6, dtype=F64)
    single = without_quarantine(policy, tiny_policy, kind)
    result = gradients(policy, advantages, quarantine=off)
    alone = rollout_gradients(single, some_tokens(policy), advantages, PolicyLoss(0.2, 0.0, Z), 6)
    assert not any(rows.any() for rows in result.grads[QUARANTINE].modules.values())
    for name, rows in alone.grads[DEPLOYED].modules.items():
        assert torch.equal(result.grads[DEPLOYED].modules[name], rows), name
    assert torch.equal(result.old_log_probs, alone.old_log_probs)


def one_layer(width=8) -> tuple[Adapter, nn.Module]:
    """A single adapted linear in float64, both blocks off their starting point."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(width, width)}).double()
    adapter = Lora(3, 2, 2.0, False, 0).attach(model)
    with torch.no_grad():
        for tensor in adapter.state().values():
            tensor.copy_(0.5 * torch.randn(tensor.shape, dtype=F64))
    return adapter, model["q_proj"]


def backward(adapter, layer, passes=None, stop_at="output"):
    """Output, gradient of x and per-rollout gradients of both blocks for a fixed loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, 8, generator=generator, dtype=F64).requires_grad_()
    up = torch.randn(6, 5, 8, generator=generator, dtype=F64)
    with adapter.per_rollout(6, BLOCKS, None, passes, stop_at) as leaves:
        y = layer(x)
        (y * up).sum().backward()
        grads = {block: torch.cat([leaf.grad.flatten(1) for leaf in leaves[block]["q_proj"]], 1) for block in BLOCKS}
    return y.detach(), x.grad, up, grads


def test_p8_a_negative_share_on_one_layer():
    adapter, layer = one_layer()
    plain, _, _, before = backward(adapter, layer)
    masked, _, _, after = backward(adapter, layer, {DEPLOYED: torch.full((6,), -0.75, dtype=F64)})
    assert relative(after[DEPLOYED], -0.75 * before[DEPLOYED]) < 1e-15
    assert relative(after[QUARANTINE], before[QUARANTINE]) < 1e-14
    assert 0 < float((masked - plain).abs().max()) < 1e-14  # one rounding, so not bitwise (P1 is for 0 and 1)
    assert StopGradient("output", -0.75, 0.0, 0.0).passes(Labels.of(FLAGGED))[DEPLOYED].tolist() == [-0.75, 1, 1, -0.75, -0.75, 1]


def test_t41_what_a_layer_hands_down():
    """The gradient of a layer's input: all of it under parameter masking, less the deployed branch under stop-gradient."""
    adapter, layer = one_layer()
    _, full, up, _ = backward(adapter, layer)
    _, stopped, _, _ = backward(adapter, layer, {DEPLOYED: 1 - FLAGGED})
    deltas = {block: layer.delta(block).detach() for block in BLOCKS}
    expected = up @ (layer.weight + deltas[DEPLOYED] + deltas[QUARANTINE])
    assert torch.allclose(full, expected, rtol=1e-13, atol=1e-13)
    without = up @ (layer.weight + deltas[QUARANTINE])
    assert torch.allclose(stopped, torch.where(FLAGGED[:, None, None] > 0, without, expected), rtol=1e-13, atol=1e-13)
    assert relative(stopped, full) > 0.1


@pytest.mark.parametrize("weights", [[0, 1, 0.5, 2, -1, 1]])
def test_t40_weighted_rows_are_the_decoupled_form(weights):
    """out = g(x) - (1 - m) g(sg x) + (1 - m) sg g(x): value kept, parameter gradient times m, input gradient full (graft.md §1.7)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)}).double()
    adapter = Lora(3, 2, 2.0, False, 0).attach(model)
    with torch.no_grad():
        for tensor in adapter.state().values():
            tensor.copy_(0.5 * torch.randn(tensor.shape, dtype=F64))
    x, up, m = torch.randn(6, 5, 8, dtype=F64), torch.randn(6, 5, 8, dtype=F64), torch.tensor(weights, dtype=F64)

    with adapter.per_rollout(6, BLOCKS) as leaves:
        y = model["down_proj"](nn.functional.gelu(model["up_proj"](x)))
        (y * up).sum().backward()
        ours = {name: m @ torch.cat([leaf.grad.flatten(1) for leaf in own], 1) for name, own in leaves[DEPLOYED].items()}

    def decoupled(name, x):
        own = {block: adapter.parameters(block)[name] for block in BLOCKS}
        g = lambda x, block: 2.0 * x @ own[block]["A"].T @ own[block]["B"].T  # noqa: E731
        share = (1 - m)[:, None, None]
        masked = g(x, DEPLOYED) - share * g(x.detach(), DEPLOYED) + share * g(x, DEPLOYED).detach()
        return nn.functional.linear(x, model[name].weight, model[name].bias) + masked + g(x, QUARANTINE)

    value = decoupled("down_proj", nn.functional.gelu(decoupled("up_proj", x)))
    assert torch.allclose(value, y, rtol=1e-12, atol=1e-12)
    (value * up).sum().backward()
    for name, module in adapter.parameters(DEPLOYED).items():
        assert relative(ours[name], torch.cat([p.grad.flatten() for p in module.values()])) < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
def test_t42_the_micro_batch_changes_neither_block(both, kind):
    policy, scale = both(kind), torch.tensor([1, 0, 1, 1, 0, 1], dtype=F64)
    how = {"quarantine": scale, "passes": {DEPLOYED: 1 - FLAGGED}}
    whole = gradients(policy, torch.ones(6, dtype=F64), **how)
    for size in (1, 2, 4, 5):
        parts = gradients(policy, torch.ones(6, dtype=F64), size, **how)
        for block in BLOCKS:
            for name, expected in whole.grads[block].modules.items():
                ours = parts.grads[block].modules[name]
                assert float((ours - expected).norm()) <= 1e-11 * float(expected.norm()), (block, name)
        assert torch.allclose(parts.losses, whole.losses, rtol=1e-12)


def test_t43_the_denominator_is_additive(both):
    """Z counts neither rows nor labels: two halves of a batch add up to the whole, and one weighted loss to its classes."""
    policy, advantages = both("lora"), advantages_for()
    tokens = some_tokens(policy)
    whole = gradients(policy, advantages, tokens=tokens)
    halves = [gradients(policy, advantages[rows], tokens=tokens.rows(rows)) for rows in ([0, 1, 2], [3, 4, 5])]
    assert whole.loss == pytest.approx(sum(half.loss for half in halves), rel=1e-12)
    for block in BLOCKS:
        sums = [half.grads[block].summed() for half in halves]
        assert close({name: sums[0][name] + sums[1][name] for name in sums[0]}, whole.grads[block].summed())


def test_t43b_a_unit_gradient_times_the_advantage_is_the_direct_backward(both):
    """Powers of two, because the model's RMSNorm rounds in single precision, and they scale its rounding with them."""
    policy, advantages = both("lora"), torch.tensor([0.5, -0.25, 4, 1, -1, 2], dtype=F64)
    scale = torch.tensor([1, 0, 1, 1, 0, 1], dtype=F64)
    asked = dict.fromkeys(BLOCKS, Asked([*torch.eye(6, dtype=F64), torch.ones(6, dtype=F64)]))
    unit = gradients(policy, torch.ones(6, dtype=F64), quarantine=scale).scaled(advantages, asked)
    direct = gradients(policy, advantages, quarantine=scale)
    for block in BLOCKS:
        assert close(unit.grads[block].summed(), direct.grads[block].summed())
        for row, alone in enumerate(torch.eye(6, dtype=F64)):
            for name, own in unit.grads[block].summed(alone).items():
                expected = direct.grads[block].modules[name][row]
                assert float((own - expected).norm()) <= 1e-12 * float(expected.norm()), (block, name, row)
    assert unit.loss == pytest.approx(direct.loss, abs=1e-12)


# ------------------------------------------------------------------------------------------------ P11, P14, P15: the adapters


def test_p11_shared_axes_cannot_tell_the_blocks_apart(tiny_policy, config):
    shared, disjoint = (gradients(tiny_policy("svd", f"adapter.axes={axes}"), advantages_for()) for axes in ("shared", "disjoint"))
    for name, rows in shared.grads[DEPLOYED].modules.items():
        assert torch.equal(rows, shared.grads[QUARANTINE].modules[name])
        mine, its = disjoint.grads[DEPLOYED].modules[name], disjoint.grads[QUARANTINE].modules[name]
        assert mine.shape != its.shape or not torch.allclose(mine, its)
    for projection in ("route", "stop_gradient"):
        with pytest.raises(build.ConfigError, match=f"projection={projection} tells the blocks apart by their axes.*bitwise equal; "
                                                    "set adapter.axes=disjoint, or choose adapter=lora or mlp"):
            build.plan(config(f"projection={projection}", "adapter=svd", "adapter.axes=shared"))
        build.plan(config(f"projection={projection}", "adapter=svd", "adapter.axes=disjoint"))


def without_quarantine(policy, tiny_policy, kind):
    """A policy with the deployed block of this one and no quarantine tensor anywhere."""
    if kind == "svd":  # an svd adapter always has both; so take them out
        single = tiny_policy(*KINDS["svd"])
        for module in single.adapter.modules.values():
            for part in (module.blocks, module.live, module.scale):
                part.pop(QUARANTINE)
        single.adapter = Adapter(single.adapter.modules)
    else:
        adapter, *words = KINDS[kind]
        single = tiny_policy(adapter, *(word for word in words if "quarantine" not in word and "gate" not in word))
    assert single.adapter.blocks == (DEPLOYED,)
    single.adapter.load_flat(policy.adapter.flatten())
    return single


@torch.no_grad()
def cached_logits(policy, ids):
    """Logits token by token through the cache of keys and values."""
    cache, logits = None, []
    for place in range(ids.shape[1]):
        out = policy.model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_p14_the_ablated_model_is_one_without_quarantine_parameters(both, tiny_policy, kind):
    """Bit for bit: live and merged, in one forward and through the cache; and the quarantine did matter before."""
    policy, ids = both(kind), torch.arange(2, 30).view(2, 14)
    single = without_quarantine(policy, tiny_policy, kind)
    with torch.no_grad():
        assert not torch.allclose(policy.model(input_ids=ids).logits, single.model(input_ids=ids).logits)
        with policy.adapter.only(DEPLOYED):
            assert torch.equal(policy.model(input_ids=ids).logits, single.model(input_ids=ids).logits)
            assert torch.equal(cached_logits(policy, ids), cached_logits(single, ids))
            with policy.adapter.merged(), single.adapter.merged():
                assert torch.equal(policy.model(input_ids=ids).logits, single.model(input_ids=ids).logits)
                assert torch.equal(cached_logits(policy, ids), cached_logits(single, ids))
    prompts, seed = ["one", "another prompt"], (0, "p14")
    ablated = sample_rollouts(policy, prompts, [3, 3], seed, 8, 1.0, 2, Seat(ANCHOR, 0.0))
    alone = sample_rollouts(single, prompts, [3, 3], seed, 8, 1.0, 2)
    assert [(r.completion_ids, r.sampler_log_probs) for r in ablated] == [(r.completion_ids, r.sampler_log_probs) for r in alone]


def test_t33_with_both_blocks_off_the_policy_is_the_frozen_model(both, config):
    base, _ = build.plan(config()).model.load()
    for kind in KINDS:
        policy, ids = both(kind), torch.arange(2, 30).view(2, 14)
        with policy.adapter.scaled({DEPLOYED: 0.0, QUARANTINE: 0.0}), torch.no_grad():
            assert torch.equal(policy.model(input_ids=ids).logits, base.double()(input_ids=ids).logits)


def test_p15_a_block_with_both_halves_at_zero_is_dead(both):
    policy = both("lora")
    with torch.no_grad():
        for module in policy.adapter.parameters(QUARANTINE).values():
            module["B"].zero_()
    half = gradients(policy, advantages_for()).grads[QUARANTINE].summed()
    for name, module in policy.adapter.parameters(QUARANTINE).items():
        a, b = half[name].split([p.numel() for p in module.values()])
        assert not a.any() and b.any(), name
    with torch.no_grad():
        for module in policy.adapter.parameters(QUARANTINE).values():
            module["A"].zero_()
    assert not any(g.any() for g in gradients(policy, advantages_for()).grads[QUARANTINE].summed().values())


@pytest.mark.parametrize("kind", KINDS)
def test_p16_the_ratio_is_one_at_the_first_inner_step_in_every_mode(both, kind):
    """Scored a second time from the same parameters, against the log-probs of the first: exactly 1 for clean, flagged and
    quarantine-off rollouts, and not if an off group is scored with the quarantine on."""
    policy, advantages = both(kind), torch.ones(6, dtype=F64)
    tokens, loss, scale = some_tokens(policy), PolicyLoss(0.2, 0.0, Z), torch.tensor([1, 0, 1, 1, 0, 1], dtype=F64)
    how = Forward(scale, {DEPLOYED: 1 - FLAGGED})
    first = rollout_gradients(policy, tokens, advantages, loss, 6, None, BLOCKS, how)
    again = rollout_gradients(policy, tokens, advantages, loss, 6, first.old_log_probs, BLOCKS, how)
    assert first.ratio == 1.0 and again.ratio == 1.0
    assert torch.equal(again.old_log_probs, first.old_log_probs)
    wrong = rollout_gradients(policy, tokens, advantages, loss, 6, first.old_log_probs, BLOCKS, Forward(None))
    assert wrong.ratio != 1.0


# ------------------------------------------------------------------------------------------------ the table of weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_t12_every_rollout_presses_equally(both, kind, mode, strength):
    """w_D n_D + w_Q n_Q = n_D + n_Q with kappa from the sizes, for every lambda, size and flag probability."""
    adapter, p = both(kind).adapter, torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=F64)
    weights = route(mode=mode, strength=strength, kappa="sizes").weights(Labels.of(p), torch.ones(4, dtype=F64), adapter, 4)
    n = {block: adapter.size(block) for block in BLOCKS}
    assert n[DEPLOYED] != n[QUARANTINE]
    pressure = weights.deployed * n[DEPLOYED] + weights.quarantine * n[QUARANTINE]
    assert torch.allclose(pressure, torch.full_like(pressure, n[DEPLOYED] + n[QUARANTINE]), rtol=1e-14)


def test_t12_a_weight_beyond_the_bound_is_refused(tiny_policy):
    """kappa is a learning rate in disguise: blocks of too different sizes are refused rather than amplified."""
    small = tiny_policy("lora", "adapter.rank=8", "adapter.quarantine_rank=1").adapter
    with pytest.raises(ValueError, match=r"projection.kappa=sizes gives a weight of 9.0, more than 4, for blocks of \d+ and \d+ numbers"):
        route(kappa="sizes").weights(Labels.of(FLAGGED), torch.ones(6), small, 6)
    route(kappa="sizes").pressures(tiny_policy("lora", "adapter.rank=6", "adapter.quarantine_rank=2").adapter)


@pytest.mark.parametrize("mode", ["classic", "exclusive"])
@pytest.mark.parametrize("kappa", [1.0, 2.0, "sizes"])
@pytest.mark.parametrize("strength", [1.2, 1.5, 3.0])
def test_t16_over_routing_never_turns_the_deployed_block_round(both, mode, kappa, strength):
    """lambda_eff >= 1, no weight beyond W_MAX, and the deployed weights of a group still sum to 0.05 G wherever lambda_eff > 1."""
    adapter, projection, size = both("lora").adapter, route(mode=mode, kappa=kappa, strength=strength), 32
    flagged = torch.stack([(torch.arange(size) < marked).to(F64) for marked in (0, 1, 8, 16, 24, 30, 31, 32)])
    capped = projection.effective(flagged, adapter)
    weights = projection.weights(Labels.of(flagged.flatten()), torch.ones(flagged.numel(), dtype=F64), adapter, size)
    assert bool((capped >= 1).all()) and bool((capped <= strength).all())
    assert bool((weights.quarantine <= 4 + 1e-12).all())
    sums = weights.deployed.view(-1, size).sum(1)
    assert bool((sums[capped[:, 0] > 1] >= 0.05 * size - 1e-9).all())
    if mode == "classic" and kappa == 1.0:
        assert capped[1].item() == strength and sums[1].item() == pytest.approx(31 + 1 - strength)
        assert capped[6].item() == 1.0  # 31 of 32 flagged: graft.md's example, where a cap without floor would reverse routing (0.98)


def test_over_routing_needs_two_streams_a_floor_and_a_clamp(config):
    words = ("arm=graft", "projection.strength=1.5")
    with pytest.raises(build.ConfigError, match=r"projection.strength above 1 flips the sign .* advantage=weighted, .*floor=true"):
        build.plan(config(*words))
    assert build.plan(config(*words, "advantage=weighted", "optimizer.floor=true")).projection.strength == 1.5


@pytest.mark.parametrize(("change", "clean", "flagged"), [
    ({}, (1, 1), (0, 1)),
    ({"kappa": 2.0}, (1, 1), (0, 2)),
    ({"kappa": 2.0, "strength": 0.5}, (1, 1), (0.5, 1.5)),
    ({"kappa": 2.0, "strength": 0.0}, (1, 1), (1, 1)),
    ({"mode": "exclusive"}, (1, 0), (0, 1)),
    ({"mode": "exclusive", "kappa": 2.0}, (2, 0), (0, 2)),
    ({"mode": "scaled", "alpha": 0.25}, (1, 0.25), (0, 1)),
    ({"mode": "scaled", "alpha": 1.0, "kappa": 2.0}, (1, 1), (0, 2)),
    ({"mode": "scaled", "alpha": 0.0}, (1, 0), (0, 1)),
    ({"mode": "custom", "clean": (0.0, 1.0), "flagged": (-1.0, 3.0)}, (0, 1), (-1, 3)),
])
def test_t14_the_corners_of_the_table(both, change, clean, flagged):
    """(deployed, quarantine) of a clean, a half flagged and a flagged rollout, then trusted, off, and off but flagged."""
    labels = Labels(torch.tensor([0, 0.5, 1, 0, 0, 1], dtype=F64), torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool))
    weights = route(**change).weights(labels, torch.tensor([1, 1, 1, 1, 0, 0], dtype=F64), both("lora").adapter, 6)
    pairs = list(zip(weights.deployed.tolist(), weights.quarantine.tolist()))
    between = tuple((one + other) / 2 for one, other in zip(clean, flagged))
    assert pairs == [clean, between, flagged, (1, 0), (1, 0), (0, 0)]


def test_t15_weights_follow_their_rollouts(both):
    adapter, order = both("lora").adapter, [3, 0, 5, 1, 4, 2]
    p, off = torch.tensor([0, 0.3, 1, 0.6, 0, 1], dtype=F64), torch.tensor([1, 1, 1, 1, 0, 0], dtype=F64)
    for projection in (route(kappa=2.0), route(mode="exclusive", strength=0.5), StopGradient("output", 0.0, 0.0, 0.0)):
        straight, turned = (projection.weights(Labels.of(p[rows]), off[rows], adapter, 6) for rows in (list(range(6)), order))
        for block in BLOCKS:
            assert torch.equal(straight.of(block)[order], turned.of(block))
            assert len(set(straight.of(block).tolist())) > 1


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "clasic"}, "projection.mode must be one of classic, exclusive, scaled, custom; got 'clasic'"),
    ({"strength": 4.5}, r"projection.strength \(lambda\) must lie in \[0, 4\]; got 4.5"),
    ({"strength": 1.5, "mode": "scaled"}, "projection.strength above 1 is defined for the modes classic and exclusive; got 'scaled'"),
    ({"kappa": 5.0}, r"projection.kappa must be `sizes` or a number in \(0, 4\]; got 5.0"),
    ({"kappa": "size"}, "projection.kappa must be `sizes` or a number"),
    ({"forward": "off"}, "projection.forward must be on or off_when_clean; got 'off'"),
    ({"clean_share": 2.0}, r"projection.clean_share must lie in \[0, 1\]; got 2.0"),
])
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        route(**change)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: StopGradient("middle", 0.0, 0.0, 0.0), "projection.at must be output or bottleneck; got 'middle'"),
    (lambda: StopGradient("output", 0.0, -1.0, 0.0), "projection.l1 and projection.gate must not be negative; got -1.0 and 0.0"),
    (lambda: Labels.of(torch.tensor([0.5, 1.5])), r"flag probabilities lie in \[0, 1\]; got 0.5 to 1.5"),
    (lambda: Labels(torch.ones(2), torch.ones(2, dtype=torch.bool)), "a rollout cannot be both flagged and trusted"),
    (lambda: Labels(torch.ones(2), torch.ones(3, dtype=torch.bool)), r"labels are \[B\] each; got flagged \[2\] and trusted \[3\]"),
])
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------ the line with two blocks


def paid(problems, completions):
    """Another environment, which pays by length: an untrained policy has groups whose rewards differ."""
    return [Grade(len(text) % 5 / 4, False, True) for text in completions]


@dataclass(frozen=True)
class Given:
    """A mask source that says what the test says, before or after the backward."""

    flags: tuple[float, ...]
    reads: tuple[str, ...] = ()
    kind = "rollout"
    pilot_batches = 0

    def label(self, view, memory):
        return Labels.of(torch.tensor(self.flags).to(view.rewards)), memory

    def facts(self, memory):
        return {}


@pytest.fixture
def start(config):
    """start(*overrides, double) -> (line, state) of a smoke-sized run in the environment `paid`."""

    def make(*overrides, double=False):
        plan = build.plan(config("optimizer.warmup_steps=0", "dataset.train_problems=24", *overrides))
        policy = build.build_policy(plan)
        if double:
            policy.model.double()
        return build.build_line(plan, policy, paid, None), State(plan.optimizer.start(policy.adapter))

    return make


TWO = ("projection=route", "adapter.rank=3", "adapter.quarantine_rank=3")


def sampled(line, step=0):
    """A step's rollouts and rewards, as the line makes them, in float64: (rollouts, rewards)."""
    t, problems = line.trainer, batch_of(line, step)
    rollouts = fill_groups(line.policy, [line.prompt(p) for p in problems], seats(line, step), t.group, [], (line.seed, "rollout", step),
                           t.max_new_tokens, t.temperature, t.prompts_per_forward)
    return rollouts, torch.tensor([grade.reward for grade in paid(None, [r.text for r in rollouts])], dtype=F64)


def view(line, state, rollouts, rewards):
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], line.policy.pad)
    return StepView(state.step, rollouts, tokens, rewards, line.policy, None, None)


def stir(policy, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in policy.adapter.state().values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def some_flags(count=16, every=3):
    return tuple(float(place % every == 0) for place in range(count))


def test_p17_permuted_masks_change_no_advantage_no_denominator_and_no_loss(start):
    line, state = start(*TWO, double=True)
    stir(line.policy)
    rollouts, rewards = sampled(line)
    seen = []
    for flags in (some_flags(), (*some_flags()[1:], 1.0), (0.0,) * 16, (1.0,) * 16):
        result, decision = differentiate(replace(line, mask_source=Given(flags)), state, view(line, state, rollouts, rewards))
        seen.append((decision, result, summed(result, decision)))
    first = seen[0]
    for decision, result, _ in seen[1:]:
        assert torch.equal(decision.routed, first[0].routed) and decision.routed.any()
        assert torch.equal(result.losses, first[1].losses)
    for name, rows in first[2][DEPLOYED].items():
        assert not torch.allclose(rows, seen[1][2][DEPLOYED][name])  # the masks did bite
    assert line.trainer.loss().denominator == 4 * 4 * 12


@pytest.mark.parametrize("words", [("projection=route",), ("projection=stop_gradient",), ("projection=erase", "mask_source=detector")])
def test_a_flagged_rollout_leaves_the_deployed_block_alone_in_a_mixed_batch(start, words):
    """Give the flagged rollouts a thousand times their advantage: the deployed block's sum keeps its bits."""
    line, state = start("adapter.quarantine_rank=3", *words, double=True)
    stir(line.policy)
    line = replace(line, mask_source=Given(some_flags()), advantage=Fixed(torch.linspace(-1, 1, 16, dtype=F64)))
    rollouts, rewards = sampled(line)
    loud = replace(line, advantage=Fixed(torch.linspace(-1, 1, 16, dtype=F64) * (1 + 999 * torch.tensor(some_flags(), dtype=F64))))
    updates = [summed(*differentiate(one, state, view(one, state, rollouts, rewards))) for one in (line, loud)]
    for name, flat in updates[0][DEPLOYED].items():
        assert torch.equal(flat, updates[1][DEPLOYED][name]) and flat.any()
    if QUARANTINE in updates[0]:
        assert all(not torch.allclose(flat, updates[1][QUARANTINE][name]) for name, flat in updates[0][QUARANTINE].items())


@dataclass(frozen=True)
class Fixed:
    """Advantages that the test gives, [B]."""

    values: torch.Tensor
    two_streams = False
    reads = ()
    flat_is_zero = False

    def __call__(self, rewards, flagged, deployed):
        return self.values.view(rewards.shape)


@pytest.mark.parametrize("optimizer", ["adamw", "split_moment"])
def test_a_step_of_flagged_rollouts_alone_leaves_the_deployed_block_bit_unchanged(start, optimizer):
    """Momentum and weight decay included: what nobody trains stands still."""
    line, state = start(*TWO, f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    stir(line.policy)
    train_step(replace(line, mask_source=Given(some_flags())), state)
    before, moments = line.policy.adapter.state(), state.optimizer.state()
    before, moments = ({key: value.clone() for key, value in one.items()} for one in (before, moments))
    train_step(replace(line, mask_source=Given((1.0,) * 16)), state)
    for key, value in line.policy.adapter.state().items():
        assert torch.equal(value, before[key]) == key.startswith(DEPLOYED), key
    assert all(torch.equal(value, moments[key]) for key, value in state.optimizer.state().items() if key.startswith(DEPLOYED))
    assert not all(torch.equal(value, moments[key]) for key, value in state.optimizer.state().items())


def test_p24_a_frozen_quarantine_at_zero_reproduces_vanilla_bit_for_bit(start):
    """mask_source=none, the quarantine at B_Q = 0 and never trained: three steps of the line, sampling and optimizer included."""
    vanilla, plain = start("adapter.rank=3")
    routed, state = start(*TWO, "projection.mode=custom", "projection.clean=[1.0,0.0]", "projection.flagged=[1.0,0.0]")
    began = vanilla.policy.adapter.fingerprint()
    for _ in range(3):
        train_step(vanilla, plain)
        train_step(routed, state)
    assert vanilla.policy.adapter.fingerprint() != began
    for key, value in vanilla.policy.adapter.state().items():
        assert torch.equal(value, routed.policy.adapter.state()[key]), key


def test_t13_a_detector_that_misses_everything_is_none_at_all(start):
    """recall 0 = mask_source=none: half ablation, bit for bit; with flags it is another run."""
    prints = {}
    for name, words in {"none": [], "blind": ["mask_source=detector", "mask_source.recall=0.0"],
                        "noisy": ["mask_source=detector", "mask_source.false_positive=0.5"]}.items():
        line, state = start(*TWO, *words)
        for _ in range(2):
            train_step(line, state)
        prints[name] = line.policy.adapter.fingerprint()
    assert prints["none"] == prints["blind"] != prints["noisy"]


def test_t13_unmasked_both_blocks_get_the_plain_gradient(start):
    line, state = start(*TWO, double=True)
    stir(line.policy)
    rollouts, rewards = sampled(line)
    seen = view(line, state, rollouts, rewards)
    result, decision = differentiate(line, state, seen)
    update, unmasked = summed(result, decision), natural(decision, result)
    expected = autograd(line.policy, decision.routed * Z / line.trainer.loss().denominator, seen.tokens)
    for block in BLOCKS:
        assert close(update[block], expected[block], 1e-6)  # rollouts share prompts, and transformers' norms are in single precision
        assert all(torch.equal(flat, unmasked[block][name]) for name, flat in update[block].items())


@pytest.mark.parametrize("words", [("advantage=dr_grpo",), ("advantage=balanced",), ("advantage=penalty",),
                                   ("advantage=balanced", "advantage.scale=all")])
def test_t43b_labels_before_or_after_the_backward_give_the_same_update(start, words):
    line, state = start(*TWO, *words, "projection.kappa=2.0", "extra_rollouts=anchor", "extra_rollouts.groups=1",
                        "extra_rollouts.rule=penalty", double=True)
    stir(line.policy)
    rollouts, rewards = sampled(line)
    flags = some_flags(20)
    (early, first), (late, second) = (differentiate(replace(line, mask_source=Given(flags, reads)), state,
                                                    view(line, state, rollouts, rewards)) for reads in ((), ("gradients",)))
    assert torch.equal(first.routed, second.routed) and first.routed.any()
    for ours, own in ((summed(late, second), summed(early, first)), (natural(second, late), natural(first, early))):
        assert ours.keys() == own.keys() == set(BLOCKS)
        assert all(close(ours[block], own[block], SINGLE) for block in BLOCKS)


def test_two_advantages_share_one_backward(start):
    """`weighted`: first moment from a_m, second from a_v, each what its own backward would give (graft.md §1.5)."""
    line, state = start(*TWO, "advantage=weighted", "optimizer=split_moment", "projection.strength=0.5", double=True)
    stir(line.policy)
    rollouts, rewards = sampled(line)
    seen = view(line, state, rollouts, rewards)
    result, decision = differentiate(replace(line, mask_source=Given(some_flags())), state, seen)
    assert not torch.allclose(decision.routed, decision.natural)
    scale = Z / line.trainer.loss().denominator
    for block in BLOCKS:
        own = autograd(line.policy, decision.routed * decision.weights.of(block) * scale, seen.tokens)[block]
        assert close(summed(result, decision)[block], own, SINGLE)
        assert close(natural(decision, result)[block], autograd(line.policy, decision.natural * scale, seen.tokens)[block], SINGLE)


@pytest.mark.parametrize("advantage", ["balanced", "weighted"])
def test_stop_gradient_has_no_unmasked_gradient_to_give(config, advantage):
    """Its mask is in the forward: with two streams it would be skipped, with split moments it would be in the second one too."""
    with pytest.raises(build.ConfigError, match="projection=stop_gradient masks in the forward, so no unmasked gradient is left for "
                                                "optimizer=split_moment; choose optimizer=adamw"):
        build.plan(config("arm=gradient_routing", "optimizer=split_moment", f"advantage={advantage}"))


def test_the_gates_aid_teaches_the_gate_of_labelled_rollouts_and_nothing_else(both):
    """A gate of zero logits costs log 2 per labelled rollout: flagged, trusted or off; it should open for the first only."""
    policy, off = both("gated"), torch.tensor([1, 1, 1, 0, 1, 1], dtype=F64)
    labels = Labels(torch.tensor([1, 0, 0, 0, 1, 0], dtype=F64), torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool))
    gates = [module["G"] for module in policy.adapter.parameters(QUARANTINE).values()]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    aid = StopGradient("output", 0.0, 0.0, 0.5).aid(labels, off, policy.adapter)
    result = gradients(policy, torch.zeros(6, dtype=F64), 4, quarantine=off, aid=aid)
    labelled = torch.tensor([1, 1, 0, 1, 1, 0], dtype=F64)
    assert torch.allclose(result.losses, 0.5 * labelled * torch.log(torch.tensor(2.0, dtype=F64)) / 6, rtol=1e-9)
    assert not any(rows.any() for rows in result.grads[DEPLOYED].modules.values())
    for name, module in policy.adapter.parameters(QUARANTINE).items():
        parts = dict(zip(module, result.grads[QUARANTINE].modules[name].split([p.numel() for p in module.values()], 1)))
        assert parts["G"].any(1).tolist() == labelled.bool().tolist()
        assert not parts["A"].any() and not parts["B"].any()


def test_the_l1_aid_is_the_mean_inner_activation(both):
    """Weight times the mean over blocks, modules and completion tokens, shared among the rollouts of the step."""
    policy = both("lora")
    tokens, ones = some_tokens(policy), torch.ones(6, dtype=F64)
    aid = StopGradient("output", 0.0, 0.25, 0.0).aid(Labels.of(0 * ones), ones, policy.adapter)
    result = gradients(policy, 0 * ones, 6, tokens, aid=aid)
    with policy.adapter.watched() as modules, torch.no_grad():
        policy.log_probs(tokens)
        inner = torch.stack([hidden.abs().mean(-1) for module in modules.values() for hidden in module.hidden.values()]).mean(0)[:, 1:]
    for row in range(6):
        mine = inner[row][tokens.completion_mask[row]].mean()
        assert float(result.losses[row]) == pytest.approx(0.25 * float(mine) / 6, rel=1e-9)
    assert all(rows.any() for block in BLOCKS for rows in result.grads[block].modules.values())


# ------------------------------------------------------------------------------------------ anchors and quarantine-off groups

ANCHORS = ("extra_rollouts=anchor", "extra_rollouts.groups=2")


@pytest.mark.parametrize("optimizer", ["adamw", "split_moment"])
def test_t23_a_window_without_the_quarantine_does_not_move_it(start, optimizer):
    """All groups off and anchors on top: parameters, moments, step counter and weight decay of the quarantine stand still."""
    line, state = start(*TWO, *ANCHORS, f"optimizer={optimizer}", "optimizer.weight_decay=0.1", "projection.forward=off_when_clean",
                        "projection.clean_share=0.0")
    stir(line.policy)
    train_step(line, state)
    before = {key: value.clone() for key, value in (line.policy.adapter.state() | state.optimizer.state()).items()}
    line = replace(line, projection=replace(line.projection, clean_share=1.0))
    assert {seat.quarantine for seat in seats(line, 1)} == {0.0}
    metrics = train_step(line, state)
    after = line.policy.adapter.state() | state.optimizer.state()
    assert all(torch.equal(value, before[key]) for key, value in after.items() if key.startswith(QUARANTINE))
    assert any(key.startswith(QUARANTINE) and "/step" in key for key in after)
    assert not any(torch.equal(value, before[key]) for key, value in after.items() if key.startswith(DEPLOYED) and key.endswith("/B"))
    assert metrics["route/kept"] == 1.0


def test_t24_t45_the_sampler_and_the_gradient_forward_agree_with_the_quarantine_off(start):
    """Anchors and off groups: merged weights and cache against the forward that is differentiated, in one batch with others."""
    line, state = start(*TWO, *ANCHORS, "projection.forward=off_when_clean", "projection.clean_share=0.5")
    stir(line.policy)
    rollouts, rewards = sampled(line)
    assert {(r.source, r.quarantine) for r in rollouts} == {(STUDENT, 0.0), (STUDENT, 1.0), (ANCHOR, 0.0)}
    line = replace(line, advantage=Fixed(torch.ones(24)))
    result, _ = differentiate(line, state, view(line, state, rollouts, rewards.float()))
    tokens = view(line, state, rollouts, rewards).tokens
    with torch.no_grad(), line.policy.adapter.only(DEPLOYED):
        fresh = line.policy.log_probs(tokens)
    with torch.no_grad():
        joint = line.policy.log_probs(tokens)
    for row, rollout in enumerate(rollouts):
        place = slice(len(rollout.prompt_ids) - 1, len(rollout.prompt_ids) - 1 + len(rollout.completion_ids))
        own, mode = result.old_log_probs[row, place], fresh if rollout.quarantine == 0 else joint
        assert torch.allclose(own, torch.tensor(rollout.sampler_log_probs), atol=1e-4)
        assert torch.allclose(own, mode[row, place], atol=1e-5)
        assert not torch.allclose(own, (joint if mode is fresh else fresh)[row, place], atol=1e-3)


def test_t25_no_anchors_is_another_option_and_anchors_change_no_other_rollout(start, config):
    with pytest.raises(build.ConfigError, match="extra_rollouts.groups must be at least 1; got 0. Use extra_rollouts=none for 0"):
        build.plan(config(*TWO, "extra_rollouts=anchor", "extra_rollouts.groups=0"))
    with pytest.raises(build.ConfigError, match="extra_rollouts=anchor samples with the quarantine off, and this adapter has none"):
        build.plan(config("extra_rollouts=anchor"))
    (without, _), (line, _) = start(*TWO), start(*TWO, *ANCHORS)
    for one in (without, line):
        stir(one.policy)
    alone, _ = sampled(without)
    beside, _ = sampled(line)
    assert [r for r in beside if r.source == STUDENT] == alone
    assert [r.group for r in beside if r.source == ANCHOR] == [4] * 4 + [5] * 4


def test_t26_anchors_rescale_no_other_rollout(start):
    """Z is that of the step's own rollouts, so their gradients are the same with and without anchors; so is the anchors' own scale."""
    (without, state), (line, _) = start(*TWO, double=True), start(*TWO, *ANCHORS, double=True)
    for one in (without, line):
        stir(one.policy)
    assert without.trainer.loss() == line.trainer.loss()
    rollouts, rewards = sampled(line)

    def kept(line, seen):
        decision = decide(line, state, seen)
        loss = line.trainer.loss()
        return rollout_gradients(line.policy, seen.tokens, decision.routed, loss, 64, None, BLOCKS, decision.forward), decision

    alone, _ = kept(without, view(without, state, rollouts[:16], rewards[:16]))
    beside, decision = kept(line, view(line, state, rollouts, rewards))
    for block in BLOCKS:
        for name, rows in alone.grads[block].modules.items():
            assert float((beside.grads[block].modules[name][:16] - rows).norm()) <= 1e-11 * float(rows.norm())
    assert decision.weights.deployed[16:].tolist() == [1.0] * 8 and not decision.weights.quarantine[16:].any()  # the triple (0, 1, 0)
    with line.policy.adapter.only(DEPLOYED):
        tokens = view(line, state, rollouts, rewards).tokens
        expected = autograd(line.policy, torch.cat([torch.zeros(16, dtype=F64), decision.routed[16:]]) * Z / (4 * 4 * 12), tokens)
    anchors = torch.arange(24) >= 16
    assert close(beside.grads[DEPLOYED].summed(anchors), expected[DEPLOYED], 1e-11)


@pytest.mark.parametrize(("rule", "reward", "weight"), [
    ("none", 1.0, 1.0), ("filter", 1.0, 0.0), ("penalty", -1.0, 1.0), ("zero", 0.0, 1.0),
])
def test_what_becomes_of_a_flagged_anchor(start, rule, reward, weight):
    """Its reward and its weight on the deployed block; rollouts that are no anchors keep theirs whatever the rule."""
    line, _ = start(*TWO, *ANCHORS, f"extra_rollouts.rule={rule}", "extra_rollouts.penalty=2.0")
    rollouts, _ = sampled(line)
    labels = Labels.of(torch.ones(24))
    paid_after, judged = line.extra_rollouts.edit(rollouts, torch.ones(24), labels)
    assert paid_after.tolist() == [1.0] * 16 + [reward] * 8
    off = torch.tensor([r.quarantine for r in rollouts])
    weights = line.projection.weights(judged, off, line.policy.adapter, line.trainer.group)
    assert weights.deployed.tolist() == [0.0] * 16 + [weight] * 8 and weights.quarantine.tolist() == [1.0] * 16 + [0.0] * 8
    untouched, same = line.extra_rollouts.edit(rollouts, torch.ones(24), Labels.of(torch.zeros(24)))
    assert torch.equal(untouched, torch.ones(24)) and not same.flagged.any()


# ------------------------------------------------------------------------------------------------------------ canaries


def test_t44_training_moves_what_is_sampled_and_both_blocks_matter(start):
    """Another policy samples other rollouts, finds its own likelier than the base model does, and deployment differs from
    training."""
    line, state = start(*TWO, "optimizer.lr=0.05")
    line = replace(line, mask_source=Given(some_flags()))
    prompts = [line.prompt(p) for p in line.problems[:4]]
    before = sample_rollouts(line.policy, prompts, [8] * 4, (0, "t44"), 12, 1.0, 4)
    for _ in range(6):
        train_step(line, state)
    modes = {scale: sample_rollouts(line.policy, prompts, [8] * 4, (0, "t44"), 12, 1.0, 4, Seat(STUDENT, scale)) for scale in (1.0, 0.0)}
    texts = [[r.completion_ids for r in rollouts] for rollouts in (before, modes[1.0], modes[0.0])]
    assert texts[0] != texts[1] and texts[1] != texts[2] and texts[0] != texts[2]
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in modes[1.0]], line.policy.pad)
    with torch.no_grad():
        trained, base = line.policy.log_probs(tokens), line.policy.reference_log_probs(tokens)
        with line.policy.adapter.only(DEPLOYED):
            deployed = line.policy.log_probs(tokens)
    assert float(trained.sum()) > float(base.sum()) + 1.0
    assert not torch.allclose(trained, deployed, atol=1e-2) and not torch.allclose(deployed, base, atol=1e-2)


def test_weights_name_their_blocks():
    weights = Weights(torch.ones(2), torch.zeros(2))
    assert weights.of(DEPLOYED) is weights.deployed and weights.of(QUARANTINE) is weights.quarantine
