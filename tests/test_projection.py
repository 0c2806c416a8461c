"""Claims about the three projections, on hand-made vectors with exact answers."""

from __future__ import annotations

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.optimizers import AdamW
from grpo_routing.projections.erase import Erase
from grpo_routing.projections.measure_only import MeasureOnly
from grpo_routing.projections.route import Route
from grpo_routing.projections.subspace import chance_share, fired_share, hackward_share, split
from grpo_routing.train import replace_step
from grpo_routing.types import Basis

AXES = Basis({"m": torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])})
G = {"m": torch.tensor([3.0, -4.0, 12.0, 0.0]), "free": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(("gate", "overshoot", "kept"), [
    ("one_sided", 1.0, [0, -4, 12, 0]),
    ("one_sided", 1.1, [-0.3, -4, 12, 0]),
    ("no_gate", 1.0, [0, 0, 12, 0]),
    ("reverse", 1.0, [-3, 4, 12, 0]),
])
def test_each_gate_removes_exactly_what_it_says(gate, overshoot, kept):
    parts = split(G, AXES, gate, overshoot, preserve_magnitude=False)
    assert torch.allclose(parts.kept["m"], torch.tensor(kept, dtype=torch.float32))
    assert torch.allclose(parts.kept["m"] + parts.removed["m"], G["m"])
    assert parts.kept["free"] is G["free"] and "free" not in parts.removed


def test_preserve_magnitude_keeps_the_length_and_changes_the_direction():
    parts = split(G, AXES, "no_gate", 1.0, preserve_magnitude=True)
    assert torch.allclose(parts.kept["m"], torch.tensor([0, 0, 13.0, 0]))


def test_the_relu_comes_before_the_sum():
    """A strong anti-hack axis must not hide a hack-ward one: |relu(3, -4)| / 13, not |3 - 4|."""
    assert hackward_share(G, AXES) == pytest.approx(3 / 13)
    assert fired_share(G, AXES) == 1.0
    assert fired_share({"m": torch.tensor([-1.0, -1, 5, 5])}, AXES) == 0.0
    assert chance_share(AXES) == pytest.approx(0.5**0.5)


def test_measure_only_is_vanilla():
    assert MeasureOnly().gradient(G, AXES) == {DEPLOYED: G}
    assert MeasureOnly().gradient(G, None)[DEPLOYED] is G


def test_route_parks_exactly_what_erase_drops():
    erased = Erase("gradient", "one_sided", 1.0, False).gradient(G, AXES)
    routed = Route("gradient", "one_sided", 1.0, False).gradient(G, AXES)
    assert torch.equal(routed[DEPLOYED]["m"], erased[DEPLOYED]["m"]) and erased.keys() == {DEPLOYED}
    assert torch.equal(routed[DEPLOYED]["m"] + routed[QUARANTINE]["m"], G["m"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"where": "weights"}, "projection.where must be gradient or step; got 'weights'"),
    ({"gate": "open"}, "projection.gate must be one of one_sided, no_gate, reverse; got 'open'"),
    ({"overshoot": 0.0}, "projection.overshoot must be positive"),
])
def test_settings_that_mean_nothing_are_refused(settings, message):
    for kind in (Erase, Route):
        with pytest.raises(ValueError, match=message):
            kind(**{"where": "gradient", "gate": "one_sided", "overshoot": 1.0, "preserve_magnitude": False} | settings)


def random_basis(adapter, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Basis({name: torch.linalg.qr(torch.randn(flat.numel(), k, generator=generator, dtype=torch.float64))[0].T
                  for name, flat in adapter.flatten().items()})


def walk(policy, projection, basis, steps=6):
    """Steps with random gradients through AdamW and the projection; returns the displacement of the deployed block."""
    adapter, generator = policy.adapter, torch.Generator().manual_seed(3)
    optimizer = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant").start(adapter)
    start, before = adapter.flatten(), {block: adapter.flatten(block) for block in adapter.blocks}
    for _ in range(steps):
        gradient = {name: torch.randn(flat.shape, generator=generator, dtype=flat.dtype) for name, flat in start.items()}
        applied, _ = optimizer.step(projection.gradient(gradient, basis), 0.01)
        final = projection.step(applied, basis)
        if final is not applied:
            replace_step(policy, applied, final)
    return {block: {name: flat - before[block][name] for name, flat in adapter.flatten(block).items()} for block in adapter.blocks}


def test_adam_leaves_the_kept_subspace_unless_the_step_is_projected(tiny_policy):
    """P20 for our projection: projecting the gradient alone lets AdamW turn the step back into the removed subspace."""
    shares = {}
    for where in ("gradient", "step"):
        policy = tiny_policy("svd")
        basis = random_basis(policy.adapter)
        moved = walk(policy, Erase(where, "no_gate", 1.0, False), basis)[DEPLOYED]
        shares[where] = max(float((rows @ moved[name]).norm() / moved[name].norm()) for name, rows in basis.modules.items())
    assert shares["step"] < 1e-12
    assert shares["gradient"] > 1e-2


def test_routing_the_step_moves_the_policy_exactly_as_vanilla_does(tiny_policy):
    """What leaves the deployed block arrives in the quarantine, so with both on nothing is lost."""
    moved = {}
    for name, projection in {"vanilla": MeasureOnly(), "route": Route("step", "one_sided", 1.0, False)}.items():
        policy = tiny_policy("svd")
        moved[name] = walk(policy, projection, random_basis(policy.adapter))
    for module, whole in moved["vanilla"][DEPLOYED].items():
        assert torch.allclose(moved["route"][DEPLOYED][module] + moved["route"][QUARANTINE][module], whole, atol=1e-12)
        assert moved["route"][QUARANTINE][module].any() and not moved["vanilla"][QUARANTINE][module].any()


def test_a_block_without_gradient_does_not_move(tiny_policy):
    """P9: a zero gradient would still coast on momentum; no gradient does not."""
    policy = tiny_policy("svd")
    optimizer = AdamW(0.1, 0.9, 0.95, 0.1, 0.0, 0, "constant").start(policy.adapter)
    ones = {name: torch.ones_like(flat) for name, flat in policy.adapter.flatten().items()}
    optimizer.step({DEPLOYED: ones, QUARANTINE: ones}, 0.1)
    parked = policy.adapter.flatten(QUARANTINE)
    optimizer.step({DEPLOYED: ones}, 0.1)
    assert all(torch.equal(flat, parked[name]) for name, flat in policy.adapter.flatten(QUARANTINE).items())


def test_blocks_are_clipped_apart(tiny_policy):
    """P10: a joint clip would let a quarantine gradient of 40 shrink the deployed block's .3 to .0075."""
    policy = tiny_policy("svd")
    optimizer = AdamW(0.0, 0.9, 0.95, 0.0, 1.0, 0, "constant").start(policy.adapter)
    sizes = {name: flat.numel() for name, flat in policy.adapter.flatten().items()}
    total = sum(sizes.values())
    update = {block: {name: torch.full((size,), norm / total**0.5, dtype=torch.float64) for name, size in sizes.items()}
              for block, norm in ((DEPLOYED, 0.3), (QUARANTINE, 40.0))}
    _, norm = optimizer.step(update, 0.0)
    assert norm == pytest.approx(0.3)
    for block, expected in ((DEPLOYED, 0.3), (QUARANTINE, 1.0)):
        squares = sum(float(p.grad.square().sum()) for m in policy.adapter.parameters(block).values() for p in m.values())
        assert squares**0.5 == pytest.approx(expected, rel=1e-5)


def test_the_schedule_warms_up_and_decays():
    constant, cosine = (AdamW(2.0, 0.9, 0.99, 0.0, 0.0, 4, kind) for kind in ("constant", "cosine"))
    assert [constant.rate(step, 100) for step in (0, 1, 3, 50)] == [0.5, 1.0, 2.0, 2.0]
    assert [round(cosine.rate(step, 104), 6) for step in (0, 4, 54, 104)] == [0.5, 2.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="schedule must be constant or cosine; got 'linear'"):
        AdamW(2.0, 0.9, 0.99, 0.0, 0.0, 4, "linear")


def test_a_basis_must_be_orthonormal():
    with pytest.raises(ValueError, match="basis of m is not orthonormal"):
        Basis({"m": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"must be \[k, D\] with k <= D"):
        Basis({"m": torch.ones(4, 2)})


def test_route_needs_a_quarantine_and_a_subspace(config):
    with pytest.raises(build.ConfigError, match=r"projection=route parks gradient in a quarantine block; adapter=lora has none\. "
                                                r"Choose adapter=svd"):
        build.plan(config("projection=route", "mask_source=random"))
    with pytest.raises(build.ConfigError, match=r"projection=erase needs a mask source of kind subspace; none is of kind none\. "
                                                r"Choose mask_source=persona_gradient\|random"):
        build.plan(config("projection=erase"))
