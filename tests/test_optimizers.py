"""Claims about the optimizers: what a block's mask, share and clip do to its step, against torch's AdamW and closed forms."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE, Adapter
from grpo_routing.optimizers import OPTIMIZERS, AdamW, Optimizer, SplitMoment
from grpo_routing.projections.subspace import Update

ADAMW = AdamW(lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.0, clip=0.0, warmup_steps=0, schedule="constant", quarantine_rate=1.0)
SPLIT = SplitMoment(**dataclasses.asdict(ADAMW), second_moment="natural", participation=0.0, max_step=0.0, floor=False)
BOTH = pytest.mark.parametrize("settings", [ADAMW, SPLIT], ids=["adamw", "split_moment"])
KEY, EPSILON = "m", 1e-8


@pytest.fixture(autouse=True)
def one_thread():
    """Vectors this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Knobs(nn.Module):
    """A module that is nothing but its blocks' parameters."""

    def __init__(self, **blocks: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({block: nn.ParameterDict({"w": nn.Parameter(torch.tensor(start, dtype=torch.float64))})
                                     for block, start in blocks.items()})


def knobs(**blocks: list[float]) -> Adapter:
    return Adapter({KEY: Knobs(**blocks)})


def flat(**blocks: list[float] | Tensor) -> Update:
    return {block: {KEY: torch.as_tensor(gradient, dtype=torch.float64)} for block, gradient in blocks.items()}


def draw(adapter: Adapter, seed: int, size: float = 1.0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {block: {name: size * torch.randn(vector.shape, generator=generator, dtype=vector.dtype)
                    for name, vector in adapter.flatten(block).items()} for block in adapter.blocks}


def shares(adapter: Adapter, **values: float) -> dict[str, float]:
    return dict.fromkeys(adapter.blocks, 1.0) | values


def snapshot(optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and state, copied."""
    own = {f"{block}/{name}": vector for block in optimizer.adapter.blocks for name, vector in optimizer.adapter.flatten(block).items()}
    return own | {f"state/{key}": value.clone() for key, value in optimizer.state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# ---- both optimizers


def test_the_schedule_warms_up_and_decays():
    constant, cosine = (dataclasses.replace(ADAMW, lr=2.0, warmup_steps=4, schedule=kind) for kind in ("constant", "cosine"))
    assert [constant.rate(step, 100) for step in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    assert [round(cosine.rate(step, 104), 6) for step in (0, 4, 54, 104)] == [0.5, 2.0, 1.0, 0.0]


@BOTH
def test_a_zero_gradient_coasts_and_no_gradient_does_not(settings):
    """P9: lr .1, betas (.9, .95), decay .1, parameter 1: after a gradient of 1 the second move is -0.0767648 or 0.0."""
    settings = dataclasses.replace(settings, lr=0.1, beta2=0.95, weight_decay=0.1)
    zero, nothing = {DEPLOYED: flat(deployed=[0.0])[DEPLOYED]}, {DEPLOYED: {}}
    moves = []
    for second in (zero, nothing, {}):
        optimizer = settings.start(knobs(deployed=[1.0]))
        one = flat(deployed=[1.0])
        optimizer.step(one, 0.1, one)
        before = optimizer.adapter.flatten()[KEY]
        applied, _ = optimizer.step(second, 0.1, second)
        moves.append(float(optimizer.adapter.flatten()[KEY] - before))
        assert applied.keys() == second.keys() and all(float(applied[block][KEY]) == -moves[-1] for block in applied)
    assert moves == [pytest.approx(-0.0767648, abs=5e-8), 0.0, 0.0]


@BOTH
def test_blocks_are_clipped_apart(tiny_policy, settings):
    """P10: a joint clip would let a quarantine gradient of 40 shrink the deployed block's .3 to .0074998."""
    optimizer = dataclasses.replace(settings, clip=1.0).start(tiny_policy("svd").adapter)
    sizes = {name: vector.numel() for name, vector in optimizer.adapter.flatten().items()}
    update = {block: {name: torch.full((size,), norm / sum(sizes.values()) ** 0.5, dtype=torch.float64) for name, size in sizes.items()}
              for block, norm in ((DEPLOYED, 0.3), (QUARANTINE, 40.0))}
    _, norms = optimizer.step(update, 0.0, update)
    assert norms == {DEPLOYED: pytest.approx(0.3), QUARANTINE: pytest.approx(40.0)}
    for block, expected in ((DEPLOYED, 0.3), (QUARANTINE, 1.0)):
        first = [value for key, value in optimizer.state().items()
                 if key.startswith(f"{block}/") and key.rpartition("/")[2] in ("exp_avg", "first")]
        assert torch.cat([value.flatten() for value in first]).norm() / 0.1 == pytest.approx(expected, rel=1e-5)
    assert 0.3 / (math.hypot(0.3, 40.0) + 1e-6) == pytest.approx(0.0074998, abs=5e-8)


@BOTH
@pytest.mark.parametrize("absent", [DEPLOYED, QUARANTINE])
def test_an_absent_block_is_frozen_as_a_whole(tiny_policy, settings, absent):
    """T23: parameters, decay, both moments and the counter stay bit for bit; the other block goes on as if alone."""
    optimizer = dataclasses.replace(settings, weight_decay=0.1, clip=1.0).start(tiny_policy("svd").adapter)
    full = draw(optimizer.adapter, 1)
    optimizer.step(full, 0.01, full)
    before = snapshot(optimizer)
    part = {block: vectors for block, vectors in draw(optimizer.adapter, 2).items() if block != absent}
    applied, norms = optimizer.step(part, 0.01, full)
    after = snapshot(optimizer)
    assert applied.keys() == norms.keys() == part.keys()
    for key, value in after.items():
        assert torch.equal(value, before[key]) == key.removeprefix("state/").startswith(f"{absent}/"), key


@BOTH
def test_the_applied_step_is_what_the_parameters_lost(tiny_policy, settings):
    optimizer = settings.start(tiny_policy("svd").adapter)
    before = snapshot(optimizer)
    update = draw(optimizer.adapter, 1)
    applied, _ = optimizer.step(update, 0.01, update)
    for key, value in ((f"{block}/{name}", step) for block, vectors in applied.items() for name, step in vectors.items()):
        assert torch.equal(before[key] - snapshot(optimizer)[key], value) and value.any()


@BOTH
def test_the_quarantine_has_a_rate_of_its_own(settings):
    """kappa (routing.md 2.7): same gradients, three times the step, decay included."""
    optimizer = dataclasses.replace(settings, weight_decay=0.5, quarantine_rate=3.0).start(knobs(deployed=[1.0], quarantine=[1.0]))
    update = flat(deployed=[2.0], quarantine=[2.0])
    applied, _ = optimizer.step(update, 0.01, update)
    assert float(applied[DEPLOYED][KEY]) == pytest.approx(0.015, abs=1e-9)
    assert float(applied[QUARANTINE][KEY]) == pytest.approx(0.045, abs=1e-9)
    with pytest.raises(ValueError, match=r"quarantine_rate is 3\.0, but the adapter has only the block deployed\. Set it to 1\.0"):
        dataclasses.replace(settings, quarantine_rate=3.0).start(knobs(deployed=[1.0]))


@BOTH
def test_a_restored_state_goes_on_bit_for_bit(tiny_policy, settings):
    """Through safetensors, with one block further than the other."""
    settings = dataclasses.replace(settings, weight_decay=0.1, clip=1.0)
    if settings.needs_natural:
        settings = dataclasses.replace(settings, participation=0.5, max_step=1.0, floor=True)
    optimizer, other = (settings.start(tiny_policy("svd", seed=seed).adapter) for seed in (0, 1))

    def go(one: Optimizer, seed: int) -> None:
        update = draw(one.adapter, seed)
        kept = {block: vectors for block, vectors in update.items() if seed % 3 or block == DEPLOYED}
        one.step(kept, 0.01, draw(one.adapter, 100 + seed), shares(one.adapter, quarantine=0.5))

    for seed in range(4):
        go(optimizer, seed)
    go(other, 9)  # what it learned before must not survive
    other.adapter.load_state(load(save(optimizer.adapter.state())))
    other.load_state(load(save(optimizer.state())))
    for seed in range(4, 8):
        go(optimizer, seed)
        go(other, seed)
        assert same(snapshot(optimizer), snapshot(other)) and optimizer.facts == other.facts


@BOTH
def test_a_state_or_update_of_another_adapter_is_refused(settings):
    optimizer, wide = settings.start(knobs(deployed=[1.0])), settings.start(knobs(deployed=[1.0], quarantine=[1.0]))
    both = flat(deployed=[1.0], quarantine=[1.0])
    wide.step(both, 0.1, both)
    with pytest.raises(ValueError, match=r"optimizer state does not fit: .* the state also has quarantine/m.*Resume with the adapter"):
        optimizer.load_state(wide.state())
    with pytest.raises(ValueError, match=r"the adapter has the blocks deployed; the update has 'quarantine'\. Choose"):
        optimizer.step(both, 0.1, both)
    with pytest.raises(ValueError, match=r"modules that the adapter lacks: n\. Make gradients and optimizer from the same adapter"):
        optimizer.step({DEPLOYED: {"n": torch.ones(1)}}, 0.1, both)


def test_adamw_is_torch_bit_for_bit(tiny_policy):
    """One torch AdamW over everything, as before the blocks had groups of their own."""
    adapter, reference = tiny_policy("svd").adapter, tiny_policy("svd").adapter
    optimizer = dataclasses.replace(ADAMW, weight_decay=0.1, clip=1.0).start(adapter)
    torch_adamw = reference_adamw(reference, weight_decay=0.1)
    for seed in range(5):
        update = draw(adapter, seed)
        if seed == 2:
            del update[QUARANTINE]
        optimizer.step(update, 0.01 / (seed + 1))
        reference_step(torch_adamw, reference, update, 0.01 / (seed + 1), clip=1.0)
    assert same(adapter.state(), reference.state()) and optimizer.facts == {}


def reference_adamw(adapter: Adapter, weight_decay: float) -> torch.optim.AdamW:
    everything = [p for block in adapter.blocks for module in adapter.parameters(block).values() for p in module.values()]
    return torch.optim.AdamW(everything, lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay)


def reference_step(optimizer: torch.optim.AdamW, adapter: Adapter, update: Update, lr: float, clip: float) -> None:
    for block in adapter.blocks:
        adapter.set_gradient(update.get(block, {}), block)
        own = [p for module in adapter.parameters(block).values() for p in module.values() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(own, clip)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


# ---- split moments


@pytest.mark.parametrize("change", [{}, {"floor": True}, {"second_moment": "routed"}, {"max_step": 4.0}], ids=str)
def test_equal_sources_are_adamw(tiny_policy, change):
    """T27, with weight decay, clipping and steps on which a block or a module is absent."""
    adapter, reference = tiny_policy("svd").adapter, tiny_policy("svd").adapter
    optimizer = dataclasses.replace(SPLIT, weight_decay=0.1, clip=1.0, **change).start(adapter)
    torch_adamw = reference_adamw(reference, weight_decay=0.1)
    for seed in range(8):
        update = draw(adapter, seed)
        if seed == 2:
            del update[QUARANTINE]
        if seed < 2:
            del update[DEPLOYED][min(update[DEPLOYED])]
        natural = draw(adapter, 50) if "second_moment" in change else update  # routed does not look at it
        optimizer.step(update, 0.01, natural)
        reference_step(torch_adamw, reference, update, 0.01, clip=1.0)
    for key, value in adapter.state().items():
        assert float((value - reference.state()[key]).abs().max()) < 1e-12, key


@pytest.mark.parametrize(("second_moment", "deployed"), [("routed", 0.5), ("natural", 1 / 11)])
def test_the_unmasked_second_moment_keeps_what_the_mask_removed(second_moment, deployed):
    """P23: d + q learns 1 and nine tenths of d's gradient are masked; Adam divides the mask out again (.500), and split
    moments keep it (.091)."""
    adapter = knobs(deployed=[0.0], quarantine=[0.0])
    optimizer = dataclasses.replace(SPLIT, second_moment=second_moment, participation=0.5).start(adapter)
    steps = 1500
    for step in range(steps):
        error = float(adapter.flatten(DEPLOYED)[KEY] + adapter.flatten(QUARANTINE)[KEY] - 1)
        routed, natural = flat(deployed=[0.1 * error], quarantine=[error]), flat(deployed=[error], quarantine=[error])
        optimizer.step(routed, 0.01 * (1 - step / steps), natural, shares(adapter))
    d, q = (float(adapter.flatten(block)[KEY]) for block in (DEPLOYED, QUARANTINE))
    assert d + q == pytest.approx(1.0, abs=1e-4)
    assert d == pytest.approx(deployed, abs=1e-4)


def test_the_clip_coefficient_comes_from_the_routed_stream_and_acts_on_both():
    """T28: |routed| = 40 and clip 1 divide both streams by 40, whatever the norm of the natural one."""
    optimizer = dataclasses.replace(SPLIT, clip=1.0).start(knobs(deployed=[0.0, 0.0], quarantine=[0.0, 0.0]))
    routed, natural = flat(deployed=[24.0, 32.0], quarantine=[0.3, 0.4]), flat(deployed=[400.0, 80.0], quarantine=[400.0, 80.0])
    _, norms = optimizer.step(routed, 0.01, natural)
    state = optimizer.state()
    assert norms == {DEPLOYED: pytest.approx(40.0), QUARANTINE: pytest.approx(0.5)}
    for block, first, second in ((DEPLOYED, [0.6, 0.8], [10.0, 2.0]), (QUARANTINE, [0.3, 0.4], [400.0, 80.0])):
        assert state[f"{block}/{KEY}/first"].tolist() == pytest.approx([0.1 * value for value in first], rel=1e-6)
        assert state[f"{block}/{KEY}/second"].tolist() == pytest.approx([0.01 * value**2 for value in second], rel=1e-6)


def test_the_clamp_does_nothing_in_budget():
    """T29, first half: |routed| <= natural keeps every step within the rate, so a clamp at 4 changes no bit."""
    free, clamped = (dataclasses.replace(SPLIT, max_step=limit).start(knobs(deployed=[0.0] * 50)) for limit in (0.0, 4.0))
    for seed in range(20):
        natural = draw(free.adapter, seed)
        routed = {DEPLOYED: {KEY: natural[DEPLOYED][KEY] * torch.rand(50, generator=torch.Generator().manual_seed(seed))}}
        for optimizer in (free, clamped):
            optimizer.step(routed, 0.01, natural)
        assert same(snapshot(free), snapshot(clamped)) and clamped.facts == {"clamped_deployed": 0.0}


def test_the_clamp_bounds_the_step_and_leaves_the_moments():
    """T29, second half: unmasked contributions that cancel leave a second moment near zero, here in half the coordinates."""
    free, clamped = (dataclasses.replace(SPLIT, max_step=limit).start(knobs(deployed=[0.0] * 4)) for limit in (0.0, 4.0))
    routed, natural = flat(deployed=[2.0, -2.0, 1.0, -1.0]), flat(deployed=[2 / 51, -2 / 51, 1.0, -1.0])
    for _ in range(10):
        wild, _ = free.step(routed, 0.01, natural)
        tame, _ = clamped.step(routed, 0.01, natural)
        assert wild[DEPLOYED][KEY].tolist() == pytest.approx([0.51, -0.51, 0.01, -0.01], rel=1e-4)
        assert tame[DEPLOYED][KEY].tolist() == pytest.approx([0.04, -0.04, 0.01, -0.01], rel=1e-4)
        assert float(tame[DEPLOYED][KEY].abs().max()) <= 4.0 * 0.01 + 1e-15
        assert clamped.facts == {"clamped_deployed": 0.5} and free.facts == {"clamped_deployed": 0.0}
        assert all(torch.equal(value, clamped.state()[key]) for key, value in free.state().items())


def test_the_floor_takes_the_larger_of_both_gradients():
    """Over-routing may make the routed gradient larger than the unmasked one, or of the other sign."""
    optimizer = dataclasses.replace(SPLIT, floor=True).start(knobs(deployed=[0.0] * 3))
    optimizer.step(flat(deployed=[-3.0, 1.0, 0.0]), 0.01, flat(deployed=[2.0, -4.0, 5.0]))
    assert optimizer.state()[f"{DEPLOYED}/{KEY}/second"].tolist() == pytest.approx([0.09, 0.16, 0.25])


@functools.cache
def realised_step(share: float, signal: float, exponent: float, masked: bool = False, second_moment: str = "natural") -> float:
    """Mean step in units of the rate along the signal, when `share` of the rollouts train a block of 2000 coordinates.

    `signal` is the squared ratio of a full sum's mean to its noise of 1. The other rollouts do not count for the block at
    all (participation), or are `masked`: then they are part of the unmasked sum.
    """
    size, steps, generator = 2000, 500, torch.Generator().manual_seed(0)
    adapter = knobs(deployed=[0.0] * size)
    optimizer = dataclasses.replace(SPLIT, participation=exponent, second_moment=second_moment).start(adapter)

    def sum_of(part: float) -> Tensor:
        return part * signal**0.5 + part**0.5 * torch.randn(size, generator=generator, dtype=torch.float64)

    for step in range(steps):
        own, others = sum_of(share), sum_of(1.0 - share)
        optimizer.step(flat(deployed=own), 1.0, flat(deployed=own + others if masked else own), {DEPLOYED: 1.0 if masked else share})
        if step == steps // 2 - 1:
            start = adapter.flatten()[KEY]
    return float((start - adapter.flatten()[KEY]).mean()) / (steps // 2)


@pytest.mark.parametrize(("signal", "exponent", "expected"), [
    (1e4, 0.0, (1.0, 1.0)), (1e4, 0.5, (0.7071, 0.5)), (1e4, 1.0, (0.5, 0.25)),  # signal: q^rho
    (0.01, 0.0, (0.7071, 0.5)), (0.01, 0.5, (0.5, 0.25)), (0.01, 1.0, (0.3536, 0.125)),  # noise: q^(rho + 1/2)
    (0.2, 0.5, (0.52, 0.28)), (0.2, 1.0, (0.37, 0.14)),  # in between, the figures of graft.md 1.6
])
def test_participation_shrinks_the_step_by_its_exponent(signal, exponent, expected):
    """T30 for shares of a half and a quarter. rho = 1 is right for signal and too little for noise, 1/2 the reverse."""
    whole = realised_step(1.0, signal, exponent)
    ratios = [realised_step(share, signal, exponent) / whole for share in (0.5, 0.25)]
    assert ratios == pytest.approx(expected, abs=0.012 if signal != 0.2 else 0.02)


@pytest.mark.parametrize(("signal", "natural", "routed"), [(1e4, 0.25, 1.0), (0.01, 0.25, 0.5)])
def test_a_masked_share_moves_the_block_by_that_share(signal, natural, routed):
    """T30's other half: a quarter unmasked is a quarter of the step; with the routed second moment 1/q or 1/sqrt(q) more."""
    whole = realised_step(1.0, signal, 0.0)
    for source, expected in (("natural", natural), ("routed", routed)):
        assert realised_step(0.25, signal, 0.0, masked=True, second_moment=source) / whole == pytest.approx(expected, abs=0.02)


def test_a_missing_capture_stops_the_run():
    """T31: no silent AdamW, not for a block nor for a module of it."""
    optimizer = dataclasses.replace(SPLIT, participation=0.5).start(knobs(deployed=[0.0], quarantine=[0.0]))
    update = flat(deployed=[1.0], quarantine=[1.0])
    for natural in (None, {DEPLOYED: update[DEPLOYED]}, update | {QUARANTINE: {}}):
        block = DEPLOYED if natural is None else QUARANTINE
        with pytest.raises(RuntimeError, match=rf"needs the unmasked gradient of every module in the update; block '{block}' lacks "
                                               r"1 of 1 \(m\)\. Capture it .* or choose optimizer=adamw"):
            optimizer.step(update, 0.1, natural, {DEPLOYED: 1.0, QUARANTINE: 1.0})
    with pytest.raises(RuntimeError, match=r"=0\.5 needs the share of rollouts that train block 'quarantine'; got none\. Hand it"):
        optimizer.step(update, 0.1, update, {DEPLOYED: 1.0})
    with pytest.raises(ValueError, match=r"train block 'quarantine' must lie in \(0, 1\]; got 0\.0\. Leave the block out"):
        optimizer.step(update, 0.1, update, {DEPLOYED: 1.0, QUARANTINE: 0.0})
    assert optimizer.state() == {} and not any(optimizer.adapter.flatten(block)[KEY].any() for block in optimizer.adapter.blocks)


@pytest.mark.parametrize(("change", "message"), [
    ({"schedule": "linear"}, "schedule must be constant or cosine; got 'linear'"),
    ({"quarantine_rate": 0.0}, r"quarantine_rate must be positive \(1 treats the blocks alike\); got 0"),
    ({"second_moment": "full"}, "second_moment must be natural or routed; got 'full'"),
    ({"participation": 0.7}, r"participation must be 0, 0\.5 or 1; got 0\.7"),
    ({"max_step": -1.0}, "max_step must be positive, or 0 for no clamp; got -1"),
    ({"floor": True, "second_moment": "routed"}, r"floor takes the larger of both .* Set floor=false or second_moment=natural"),
])
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"optimizer\.{message}"):
        dataclasses.replace(SPLIT, **change)


def test_each_optimizer_says_whether_it_needs_the_unmasked_gradients():
    assert {name: kind.needs_natural for name, kind in OPTIMIZERS.items()} == {"adamw": False, "split_moment": True}
