"""TDGA: what the trusted projection keeps, when the update stays inside, what the warm-up leaves behind, and its controls.

P-numbers are the property tests of routing.md §4.5.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from grpo_routing import build, drift
from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.drift import canonical, left_directions
from grpo_routing.mask_sources.direction import Fit
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.trusted_subspace import TrustedSubspace, clean_nll
from grpo_routing.optimizers import AdamW
from grpo_routing.projections.restrict import Restrict, inside_of, output_side, trusted_share
from grpo_routing.run import run
from grpo_routing.train import State, replace_step
from grpo_routing.types import Trusted
from tests.test_calibration import F64
from tests.test_controls import KNOWN

NAME = "m"


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def trusted_of(d_out=16, k=3, rank=4, seed=5) -> Trusted:
    shares = torch.arange(k, 0, -1, dtype=F64)
    return Trusted({NAME: torch.linalg.qr(normal(d_out, k, seed=seed)).Q}, {NAME: shares / shares.sum()}, rank)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------ P19: the projector


@pytest.mark.parametrize("k", [1, 3, 5])
def test_p19_what_is_kept(k):
    trusted, g = trusted_of(k=k), normal(16, 4)
    u, alpha, kept = trusted.modules[NAME], trusted.weights[NAME], inside_of(trusted_of(k=k), NAME, g)
    assert float(alpha.sum()) == pytest.approx(1.0)
    assert float((kept - u @ (u.T @ kept)).norm()) < 1e-14 * float(g.norm()), "nothing outside of the trusted directions"
    inner = float((g * kept).sum())
    assert inner == pytest.approx(float(sum(a * (u[:, i] @ g).square().sum() for i, a in enumerate(alpha)))) and inner >= 0
    twice = inside_of(trusted, NAME, kept)
    assert (relative(twice, kept) < 1e-14) is (k == 1), "a projector for one direction only"
    eigenvalues = torch.linalg.eigvalsh(inside_of(trusted, NAME, torch.eye(16, dtype=F64)))
    assert torch.allclose(eigenvalues[-k:].flip(0), alpha) and float(eigenvalues[:-k].abs().max()) < 1e-14
    uniform = Trusted(trusted.modules, {NAME: torch.ones(k, dtype=F64)}, 4)
    assert relative(inside_of(uniform, NAME, inside_of(uniform, NAME, g)), inside_of(uniform, NAME, g)) < 1e-14


def test_only_the_output_side_is_projected():
    """The last numbers of [A | B] are B; A keeps its gradient to the bit, under every setting."""
    trusted, flat = trusted_of(), torch.cat([normal(4 * 10), normal(16, 4, seed=1).flatten()])
    assert torch.equal(output_side(flat, trusted, NAME), normal(16, 4, seed=1))
    for direction in ("restricted", "whole"):
        for length in ("restricted", "whole"):
            after = Restrict("gradient", direction, length).gradient({DEPLOYED: {NAME: flat}}, trusted)[DEPLOYED][NAME]
            assert torch.equal(after[:40], flat[:40]) and after.shape == flat.shape
            if (direction, length) == ("restricted", "restricted"):
                assert torch.equal(after[40:].view(16, 4), inside_of(trusted, NAME, normal(16, 4, seed=1)))
            if (direction, length) == ("whole", "whole"):
                assert torch.equal(after, flat), "that is vanilla"


def two_modules() -> tuple[dict, Trusted]:
    a, b = trusted_of(), trusted_of(d_out=12, k=2, seed=6)
    trusted = Trusted({"m": a.modules[NAME], "n": b.modules[NAME]}, {"m": a.weights[NAME], "n": b.weights[NAME]}, 4)
    return {"m": torch.cat([normal(40), normal(64, seed=1)]), "n": torch.cat([normal(8), 5 * normal(48, seed=2)])}, trusted


def test_the_controls_tell_direction_from_length():
    """Over the output sides of all modules together: norm-matched has vanilla's length and TDGA's direction, shrunk the other way."""
    vector, trusted = two_modules()

    def outputs(direction, length):
        after = Restrict("gradient", direction, length).gradient({DEPLOYED: vector}, trusted)[DEPLOYED]
        return torch.cat([output_side(flat, trusted, name).flatten() for name, flat in after.items()])

    tdga, matched, shrunk = outputs("restricted", "restricted"), outputs("restricted", "whole"), outputs("whole", "restricted")
    vanilla = outputs("whole", "whole")
    assert float(matched.norm()) == pytest.approx(float(vanilla.norm()), rel=1e-13)
    assert float(shrunk.norm()) == pytest.approx(float(tdga.norm()), rel=1e-13) and float(tdga.norm()) < 0.7 * float(vanilla.norm())
    for one, other in ((matched, tdga), (shrunk, vanilla)):
        assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) == pytest.approx(1.0, abs=1e-13)
    assert float(torch.nn.functional.cosine_similarity(tdga, vanilla, dim=0)) < 0.9


def test_nothing_stays_nothing():
    vector, trusted = two_modules()
    zero = {name: torch.zeros_like(flat) for name, flat in vector.items()}
    for direction, length in (("restricted", "whole"), ("whole", "restricted")):
        after = Restrict("gradient", direction, length).gradient({DEPLOYED: zero}, trusted)[DEPLOYED]
        assert all(torch.equal(flat, zero[name]) for name, flat in after.items())


def test_where_says_what_is_projected():
    vector, trusted = two_modules()
    update = {DEPLOYED: vector}
    gradient, step = (Restrict(where, "restricted", "restricted") for where in ("gradient", "step"))
    assert gradient.step(update, trusted) is update and step.gradient(update, trusted) is update
    for name, flat in step.step(update, trusted)[DEPLOYED].items():
        assert torch.equal(flat, gradient.gradient(update, trusted)[DEPLOYED][name])


def test_the_trusted_share_of_a_gradient():
    vector, trusted = two_modules()
    inside = Restrict("gradient", "restricted", "restricted").gradient({DEPLOYED: vector}, trusted)[DEPLOYED]
    assert trusted_share(inside, trusted) == pytest.approx(1.0)
    outside = {name: flat.clone() for name, flat in vector.items()}
    for name, flat in outside.items():
        u, b = trusted.modules[name], output_side(flat, trusted, name)
        b.sub_(u @ (u.T @ b))
    assert trusted_share(outside, trusted) == pytest.approx(0.0, abs=1e-14)
    kept = sum((trusted.modules[n].T @ output_side(flat, trusted, n)).square().sum() for n, flat in vector.items())
    whole = vector["m"][40:].square().sum() + vector["n"][8:].square().sum()
    assert trusted_share(vector, trusted) == pytest.approx(float((kept / whole).sqrt()))


@pytest.mark.parametrize(("settings", "message"), [
    (("weights", "whole", "whole"), "projection.where must be gradient or step; got 'weights'"),
    (("step", "clean", "whole"), "projection.direction must be restricted or whole; got 'clean'"),
    (("step", "whole", "short"), "projection.length must be restricted or whole; got 'short'"),
])
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Restrict(*settings)


def test_frames_and_weights_are_checked():
    good = trusted_of()
    with pytest.raises(ValueError, match="the trusted directions of m are not orthonormal"):
        Trusted({NAME: 2 * good.modules[NAME]}, good.weights, 4)
    with pytest.raises(ValueError, match="m has 3 trusted directions and 2 weights"):
        Trusted(good.modules, {NAME: torch.ones(2)}, 4)


# --------------------------------------------------------------------------------------------- P20: where the update goes


def test_p20_adam_turns_a_projected_gradient_out_of_the_subspace_and_a_projected_step_stays(tiny_policy):
    """Share of what B moved in 50 steps that lies outside of span(U), worst module."""
    policy = tiny_policy("lora", "adapter.rank=4")
    adapter, start = policy.adapter, policy.adapter.flatten()
    shapes = {name: module["B"].shape for name, module in adapter.parameters().items()}
    trusted = Trusted({name: torch.linalg.qr(normal(shape[0], 2, seed=place)).Q for place, (name, shape) in enumerate(shapes.items())},
                      {name: torch.tensor([0.7, 0.3], dtype=F64) for name in shapes}, 4)

    def outside(where, optimizer):
        adapter.load_flat(start)
        restrict, generator = Restrict(where, "restricted", "restricted"), torch.Generator().manual_seed(3)
        adam = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant", 1.0).start(adapter)
        pull = {name: torch.randn(flat.shape, generator=generator, dtype=F64) for name, flat in start.items()}
        for _ in range(50):
            noisy = {name: flat + torch.randn(flat.shape, generator=generator, dtype=F64) for name, flat in pull.items()}
            update = restrict.gradient({DEPLOYED: noisy}, trusted)
            if optimizer == "sgd":
                adapter.load_flat({name: flat - 0.01 * update[DEPLOYED][name] for name, flat in adapter.flatten().items()})
                continue
            applied, _ = adam.step(update, 0.01)
            final = restrict.step(applied, trusted)
            if final is not applied:
                replace_step(policy, applied, final)
        shares = []
        for name, flat in adapter.flatten().items():
            moved, u = output_side(flat - start[name], trusted, name), trusted.modules[name]
            shares.append(float((moved - u @ (u.T @ moved)).norm() / moved.norm()))
        return shares

    assert max(outside("gradient", "sgd")) < 1e-12
    assert min(outside("gradient", "adam")) > 0.2
    assert max(outside("step", "adam")) < 1e-12


# --------------------------------------------------------------------------------------------------------------- P21: CCA


def test_p21_the_canonical_correlation_on_known_frames():
    frame = torch.linalg.qr(normal(20, 6)).Q
    one, other = frame[:, :3], frame[:, 3:]
    assert canonical(one, one) == pytest.approx(1.0) and canonical(one, one @ torch.linalg.qr(normal(3, 3)).Q) == pytest.approx(1.0)
    assert canonical(one, other) == pytest.approx(0.0, abs=1e-14)
    assert canonical(one, torch.cat([one[:, :1], other[:, :2]], 1)) == pytest.approx(1 / 3)
    assert canonical(one[:, :1], one[:, :1] * 0.6 + one[:, 1:2] * 0.8) == pytest.approx(0.6), "k = 1 is |cos|"
    units = torch.nn.functional.normalize(normal(2, 3000, 256), dim=2)
    drawn = [canonical(a[:, None], b[:, None]) for a, b in zip(*units[:, :300])]
    wide = float((units[0] * units[1]).sum(1).abs().mean())  # the same thing, of more draws
    assert math.sqrt(2 / (math.pi * 256)) == pytest.approx(0.05, abs=1e-3)
    assert wide == pytest.approx(0.05, rel=0.05) and sum(drawn) / 300 == pytest.approx(wide, rel=0.15)


def test_left_directions_are_those_of_the_update():
    u, v = torch.linalg.qr(normal(10, 3)).Q, torch.linalg.qr(normal(7, 3, seed=1)).Q
    found = left_directions(u @ torch.diag(torch.tensor([3.0, 2, 1], dtype=F64)) @ v.T, 2)
    assert found.shape == (10, 2) and torch.allclose((found.T @ u[:, :2]).abs(), torch.eye(2, dtype=F64), atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- the warm-up


def source(**change) -> TrustedSubspace:
    return TrustedSubspace(**{"control": "none", "seed": 0, "pairs": "prog.yaml", "known": KNOWN, "k": 3, "weights": "singular", "steps": 3,
                              "lr": 5e-3, "micro_batch": 64} | change)


def test_the_warm_up_ends_where_it_began(tiny_policy):
    """Bit for bit, both blocks, with no gradient left behind."""
    policy = tiny_policy("lora", "adapter.quarantine_rank=3")
    before = {key: value.clone() for key, value in policy.adapter.state().items()}
    source().fit(policy)
    assert all(torch.equal(value, before[key]) for key, value in policy.adapter.state().items())
    for block in policy.adapter.blocks:
        assert all(p.grad is None for module in policy.adapter.parameters(block).values() for p in module.values())


def test_the_frames_are_those_of_supervised_steps_on_the_clean_answers(tiny_policy):
    """Against the same warm-up written out with autograd: Adam on the mean of the answers' mean NLL."""
    policy, own = tiny_policy(), source()
    fit = own.fit(policy)
    texts = [(pair.prompt, pair.clean) for pair in load_pairs("prog.yaml", KNOWN)]
    modules, tokens = policy.adapter.parameters(), policy.batch(texts)
    start = {name: (module["B"] @ module["A"]).detach().clone() for name, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.values()]
    assert fit.facts["warm_up_nll"] < float(clean_nll(policy, texts).mean())
    adam = torch.optim.Adam(parameters, 5e-3)
    for _ in range(3):
        adam.zero_grad()
        (-policy.log_probs(tokens).sum(1) / tokens.completion_mask.sum(1)).mean().backward()
        adam.step()
    assert fit.facts["warm_up_nll"] == pytest.approx(float(clean_nll(policy, texts).mean()), abs=1e-5)
    energies = []
    for name, module in modules.items():
        u, s, _ = torch.linalg.svd((module["B"] @ module["A"]).detach() - start[name])
        frame, alpha = fit.basis.modules[name], fit.basis.weights[name]
        assert canonical(frame, u[:, :3]) == pytest.approx(1.0, abs=1e-4) and frame.shape[1] == 3
        assert torch.allclose(alpha, s[:3] / s[:3].sum(), atol=1e-4) and float(alpha.sum()) == pytest.approx(1.0)
        energies.append(float(s[:3].square().sum() / s.square().sum()))
    assert fit.facts["trusted_energy"] == pytest.approx(sum(energies) / len(energies), abs=1e-4) and fit.basis.rank == 8


def test_the_random_control_has_as_many_directions_and_the_same_weights(tiny_policy):
    policy = tiny_policy()
    real, random_, again, other = (source(**change).fit(policy).basis for change in (
        {}, {"control": "random"}, {"control": "random"}, {"control": "random", "seed": 1}))
    for name, frame in real.modules.items():
        assert random_.modules[name].shape == frame.shape and torch.equal(random_.weights[name], real.weights[name])
        assert torch.equal(random_.modules[name], again.modules[name])
    drawn = [sum(canonical(a.modules[n], b.modules[n]) for n in a.modules) / len(a.modules) for a, b in ((real, random_), (random_, other))]
    assert max(drawn) < 0.6


def test_uniform_weights_are_a_projector(tiny_policy):
    policy = tiny_policy()
    singular, uniform = (source(weights=weights).fit(policy).basis for weights in ("singular", "uniform"))
    for name, frame in singular.modules.items():
        assert torch.equal(uniform.modules[name], frame) and uniform.weights[name].tolist() == [1.0] * 3


@pytest.mark.parametrize(("change", "message"), [
    ({"weights": "none"}, "mask_source.weights must be singular or uniform; got 'none'"),
    ({"k": 0}, "trusted_subspace needs k >= 1, steps >= 1 and lr > 0; got 0, 3 and 0.005"),
    ({"steps": 0}, "got 3, 0 and 0.005"),
    ({"lr": 0.0}, "got 3, 3 and 0.0"),
])
def test_a_warm_up_that_means_nothing_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        source(**change)


def test_only_a_lora_has_trusted_directions(config):
    with pytest.raises(build.ConfigError, match="finds directions for the B of a LoRA; choose adapter=lora with adapter.gate=false"):
        build.plan(config("arm=tdga", "adapter=svd"))
    with pytest.raises(build.ConfigError, match="projection=restrict takes a mask source of kind trusted; persona_gradient is of kind"):
        build.plan(config("projection=restrict", "mask_source=persona_gradient"))


def test_a_fit_survives_a_checkpoint(tiny_policy, tmp_path):
    policy = tiny_policy()
    optimizer = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant", 1.0)
    state, fresh = State(optimizer.start(policy.adapter), fit=source(steps=1).fit(policy)), State(optimizer.start(policy.adapter))
    save_checkpoint(tmp_path, policy.adapter, state)
    assert load_checkpoint(tmp_path, policy.adapter, fresh)
    assert isinstance(fresh.fit, Fit) and isinstance(fresh.fit.basis, Trusted) and fresh.fit.facts == state.fit.facts
    ours, theirs = fresh.fit.basis, state.fit.basis
    assert ours.rank == theirs.rank and ours.modules.keys() == theirs.modules.keys() == ours.weights.keys()
    for part, other in ((ours.modules, theirs.modules), (ours.weights, theirs.weights)):
        assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in part.items())


# ---------------------------------------------------------------------------------------------------------------- the drift


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A smoke run of the arm that keeps all its checkpoints."""
    output = tmp_path_factory.mktemp("drift")
    return run(config("arm=tdga", "loophole=held_out", f"output={output}", "evaluation.problems=6", "trainer.checkpoints_kept=0",
                      "optimizer.warmup_steps=0", "mask_source.steps=2", "trainer.steps=3"))


def test_drift_is_the_correlation_of_the_updates_of_two_checkpoints(tiny_policy, tmp_path, capsys):
    """Updates that are written by hand: the first output axis, then one turned by an angle whose cosine is 0.6."""
    policy = tiny_policy("lora", "adapter.rank=2")
    for step, (first, second) in ((20, (1.0, 0.0)), (60, (0.6, 0.8))):
        with torch.no_grad():
            for module in policy.adapter.parameters().values():
                module["B"].zero_()
                module["B"][0, 0], module["B"][1, 0] = first, second
        optimizer = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant", 1.0).start(policy.adapter)
        save_checkpoint(tmp_path / "checkpoints", policy.adapter, State(optimizer, step))
    found = drift.between(tmp_path, 20, 60, (1,))
    assert found.keys() == policy.adapter.modules.keys() and all(values == {1: pytest.approx(0.6)} for values in found.values())
    assert drift.main([str(tmp_path), "--k", "1"]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[-3:]} == {"0.600"}


def test_the_drift_of_a_run_that_kept_its_checkpoints(finished, capsys):
    assert sorted(path.name for path in (finished / "checkpoints").glob("step-*")) == [f"step-{step:06d}" for step in (1, 2, 3)]
    assert drift.main([str(finished), "--first", "2", "--last", "2", "--k", "1", "3"]) == 0
    head, *lines, mean, worst = capsys.readouterr().out.splitlines()
    assert head.split() == ["module", "CCA_1", "CCA_3"] and len(lines) == 14
    assert all(line.split()[1:] == ["1.000", "1.000"] for line in (*lines, mean, worst)), "a checkpoint has not drifted from itself"
    assert drift.main([str(finished), "--first", "1", "--last", "3"]) == 0
    rows = [list(map(float, line.split()[1:])) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[-2] == pytest.approx([sum(column) / 14 for column in zip(*rows[:14])], abs=1e-3)
    assert rows[-1] == [min(column) for column in zip(*rows[:14])]
    assert all(0 <= value <= 1 for row in rows for value in row)


def test_the_drift_of_what_is_not_there_is_refused(finished, capsys, tmp_path):
    assert drift.main([str(finished), "--first", "1", "--last", "60"]) == 2
    said = capsys.readouterr().err
    assert "step-000060; the run kept step-000001, step-000002, step-000003. Train with trainer.checkpoints_kept=0 to keep all" in said
    assert drift.main([str(tmp_path)]) == 2
    assert "the run kept none" in capsys.readouterr().err


def test_the_run_logs_what_is_trusted(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert {"route/trusted_share", "route/trusted_step", "route/trusted_energy", "route/warm_up_nll"} <= row.keys()
        assert all(0 <= row[name] <= 1 + 1e-6 for name in ("route/trusted_share", "route/trusted_step", "route/trusted_energy"))
