"""Claims about the projections that act on the summed gradient, on hand-made vectors with exact answers."""

from __future__ import annotations

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.optimizers import AdamW
from grpo_routing.projections.erase import Erase
from grpo_routing.projections.measure_only import MeasureOnly
from grpo_routing.projections.route_subspace import RouteSubspace
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
    whole = {DEPLOYED: G}
    assert MeasureOnly().gradient(whole, AXES) is whole and MeasureOnly().step(whole, None) is whole


def test_route_parks_exactly_what_erase_drops():
    erased = Erase("gradient", "one_sided", 1.0, False).gradient({DEPLOYED: G}, AXES)
    routed = RouteSubspace("gradient", "one_sided", 1.0, False).gradient({DEPLOYED: G}, AXES)
    assert torch.equal(routed[DEPLOYED]["m"], erased[DEPLOYED]["m"]) and erased.keys() == {DEPLOYED}
    assert torch.equal(routed[DEPLOYED]["m"] + routed[QUARANTINE]["m"], G["m"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"where": "weights"}, "projection.where must be gradient or step; got 'weights'"),
    ({"gate": "open"}, "projection.gate must be one of one_sided, no_gate, reverse; got 'open'"),
    ({"overshoot": 0.0}, "projection.overshoot must be positive"),
])
def test_settings_that_mean_nothing_are_refused(settings, message):
    for kind in (Erase, RouteSubspace):
        with pytest.raises(ValueError, match=message):
            kind(**{"where": "gradient", "gate": "one_sided", "overshoot": 1.0, "preserve_magnitude": False} | settings)


def random_basis(adapter, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Basis({name: torch.linalg.qr(torch.randn(flat.numel(), k, generator=generator, dtype=torch.float64))[0].T
                  for name, flat in adapter.flatten().items()})


def walk(policy, projection, basis, steps=6):
    """Steps with random gradients through AdamW and the projection; returns the displacement of the deployed block."""
    adapter, generator = policy.adapter, torch.Generator().manual_seed(3)
    optimizer = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant", 1.0).start(adapter)
    start, before = adapter.flatten(), {block: adapter.flatten(block) for block in adapter.blocks}
    for _ in range(steps):
        gradient = {name: torch.randn(flat.shape, generator=generator, dtype=flat.dtype) for name, flat in start.items()}
        applied, _ = optimizer.step(projection.gradient({DEPLOYED: gradient}, basis), 0.01)
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
    for name, projection in {"vanilla": MeasureOnly(), "route": RouteSubspace("step", "one_sided", 1.0, False)}.items():
        policy = tiny_policy("svd")
        moved[name] = walk(policy, projection, random_basis(policy.adapter))
    for module, whole in moved["vanilla"][DEPLOYED].items():
        assert torch.allclose(moved["route"][DEPLOYED][module] + moved["route"][QUARANTINE][module], whole, atol=1e-12)
        assert moved["route"][QUARANTINE][module].any() and not moved["vanilla"][QUARANTINE][module].any()


def test_a_basis_must_be_orthonormal():
    with pytest.raises(ValueError, match="basis of m is not orthonormal"):
        Basis({"m": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"must be \[k, D\] with k <= D"):
        Basis({"m": torch.ones(4, 2)})


def test_route_subspace_needs_a_quarantine_on_the_same_axes_and_a_subspace(config):
    with pytest.raises(build.ConfigError, match="projection=route_subspace needs a quarantine block; adapter=lora has none as configured"):
        build.plan(config("projection=route_subspace", "mask_source=persona_gradient"))
    for adapter in (["adapter=svd", "adapter.axes=disjoint"], ["adapter=lora", "adapter.quarantine_rank=2"]):
        with pytest.raises(build.ConfigError, match="needs the same coordinates; choose adapter=svd with adapter.axes=shared"):
            build.plan(config("projection=route_subspace", "mask_source=persona_gradient", *adapter))
    with pytest.raises(build.ConfigError, match=r"projection=route_subspace takes a mask source of kind subspace; none is of kind none\. "
                                                r"Choose mask_source=persona_gradient\|persona_activation, or projection="):
        build.plan(config("projection=route_subspace", "adapter=svd"))


def test_erase_needs_something_to_erase(config):
    with pytest.raises(build.ConfigError, match=r"projection=erase takes a mask source of kind subspace or rollout; none is of kind none\. "
                                                r"Choose mask_source=persona_gradient\|persona_activation\|fingerprint\|detector"):
        build.plan(config("projection=erase"))
