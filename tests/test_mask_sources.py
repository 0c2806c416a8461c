"""Claims about directions: what a basis is fitted on, how it is oriented, and that the controls are controls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.mask_sources.direction import completion_gradients, fit_basis, joined, overlap, pair_differences, separation
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.types import Basis, TokenBatch

KNOWN = ("run_tests", "sentinel", "stdout_marker")


@pytest.fixture
def source(config):
    def make(name="persona_gradient", *overrides):
        return build.plan(config("loophole=held_out", f"mask_source={name}", *overrides)).mask_source

    return make


@pytest.mark.parametrize("adapter", ["lora", "svd"])
def test_batched_completion_gradients_equal_one_backward_each(tiny_policy, adapter):
    policy = tiny_policy(adapter)
    texts = [(pair.prompt, pair.hack) for pair in load_pairs("prog.yaml", KNOWN)[:3]]
    batched = completion_gradients(policy, texts, micro_batch=2)
    for row, (prompt, completion) in enumerate(texts):
        tokens = TokenBatch.of([(policy.encode(prompt), (*policy.encode(completion), policy.end))], policy.pad)
        logits = torch.log_softmax(policy.model(input_ids=tokens.ids).logits[:, :-1], -1)
        nll = -logits.gather(2, tokens.ids[:, 1:, None]).squeeze(2)[tokens.completion_mask].mean()
        parameters = {name: list(m.values()) for name, m in policy.adapter.parameters().items()}
        grads = iter(torch.autograd.grad(nll, [p for own in parameters.values() for p in own]))
        for name, own in parameters.items():
            expected = torch.cat([next(grads).flatten() for _ in own])
            assert float((batched[name][row] - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("adapter", ["lora", "svd"])
@pytest.mark.parametrize("micro_batch", [2, 64])
def test_a_packed_pair_has_the_difference_of_its_two_gradients(tiny_policy, adapter, micro_batch):
    """Sharing the prompt between both answers saves tokens and changes nothing."""
    policy, pairs = tiny_policy(adapter), load_pairs("prog.yaml", KNOWN)[:5]
    packed = pair_differences(policy, pairs, "hack", "clean", micro_batch)
    apart = completion_gradients(policy, [(p.prompt, text) for p in pairs for text in (p.hack, p.clean)], 64)
    for name, rows in packed.items():
        expected = apart[name][0::2] - apart[name][1::2]
        assert float((rows - expected).norm() / expected.norm()) < 1e-5, name


def test_a_planted_direction_is_found_and_points_hackward():
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(50, generator=generator), dim=0)
    noise = 0.01 * torch.randn(8, 50, generator=generator)
    for sign in (1.0, -1.0):  # the singular vectors' own sign is arbitrary; the vote decides
        basis = fit_basis({"m": sign * 3 * direction + noise}, k=1, tau=0.0, floor=0.0)
        assert float(basis.modules["m"][0] @ (sign * direction)) > 0.999


def test_an_outlier_does_not_turn_the_vote():
    rows = torch.zeros(5, 4)
    rows[:4, 0], rows[4, 0] = 1.0, -3.0  # four pairs say +, one loud pair says -
    basis = fit_basis({"m": rows}, k=1, tau=0.0, floor=0.0)
    assert basis.modules["m"][0, 0] > 0


def test_weak_axes_and_weak_modules_are_cut():
    strong, weak = torch.diag(torch.tensor([10.0, 1.0, 0.0])), torch.diag(torch.tensor([0.1, 0.01, 0.0]))
    whole = fit_basis({"strong": strong, "weak": weak}, k=2, tau=0.0, floor=0.0)
    assert {name: len(rows) for name, rows in whole.modules.items()} == {"strong": 2, "weak": 2}
    cut = fit_basis({"strong": strong, "weak": weak}, k=2, tau=0.5, floor=0.0)
    assert {name: len(rows) for name, rows in cut.modules.items()} == {"strong": 1, "weak": 1}
    floored = fit_basis({"strong": strong, "weak": weak}, k=2, tau=0.0, floor=0.5)
    assert floored.modules.keys() == {"strong"}


def test_identical_answers_have_no_direction():
    with pytest.raises(ValueError, match="the pairs give no direction in any module"):
        fit_basis({"m": torch.zeros(3, 4)}, k=2, tau=0.0, floor=0.0)


def test_joined_bases_span_both_and_keep_their_orientation():
    first, second = torch.tensor([[0.0, 0.0, -1.0]]), torch.tensor([[0.6, 0.0, -0.8]])
    (axes,) = joined([Basis({"m": first}), Basis({"m": second})]).modules.values()
    assert torch.allclose(axes, torch.tensor([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]), rtol=0, atol=1e-6)
    assert float((axes @ second[0])[1]) > 0, "the second axis points where its basis did"
    both = joined([Basis({"m": first, "other": second}), Basis({"m": first})])
    assert len(both.modules["m"]) == 1 and torch.allclose(both.modules["other"], second, rtol=0, atol=1e-6), "nothing of its own is left"


def test_a_basis_per_loophole_holds_the_first_axis_of_every_loopholes_own_pairs(tiny_policy, source):
    """Whatever the other loopholes' pairs are like: each one's mean hack-ward direction lies in the span, on its hack-ward side."""
    made = source("persona_gradient", "mask_source.k=1", "mask_source.per_loophole=true", "mask_source.held_out=0")
    policy, pairs = tiny_policy(), made.load()
    basis = made.fit(policy).basis
    differences = pair_differences(policy, pairs, "hack", "clean", 64)
    for loophole in made.known:
        own = [row for row, pair in enumerate(pairs) if pair.loophole == loophole]
        alone = fit_basis({name: rows[own] for name, rows in differences.items()}, 1, 0.0, 0.0)
        for name, axis in alone.modules.items():
            assert float((basis.modules[name] @ axis[0]).norm()) > 1 - 1e-4, (loophole, name)
    assert {len(rows) for rows in basis.modules.values()} == {len(made.known)}


def test_a_fit_reads_known_pairs_only_and_reports_the_held_out_ones(tiny_policy, source):
    policy = tiny_policy()
    fit = source().fit(policy)
    assert fit.facts["pairs"] == 9.0  # twelve pairs of three known loopholes, three held out
    assert 0.0 <= fit.facts["separation_held_out"] <= 1.0
    everything = source("persona_gradient", "loophole=all").fit(policy)
    assert everything.facts["pairs"] == 13.0
    assert overlap(fit.basis, everything.basis) < 0.999


def test_the_controls_have_the_same_shape_and_another_direction(tiny_policy, source):
    policy = tiny_policy()
    real = source().fit(policy).basis
    shapes = {name: rows.shape for name, rows in real.modules.items()}
    for name in ("random", "shuffled", "nonhack"):
        control = source("persona_gradient", f"mask_source.control={name}").fit(policy).basis
        assert {module: rows.shape for module, rows in control.modules.items()} == shapes
        assert overlap(real, control) < 0.9, name
    random_ = source("persona_gradient", "mask_source.control=random").fit(policy).basis
    chance = sum(len(rows) / rows.shape[1] for rows in random_.modules.values()) / len(shapes)
    assert overlap(real, random_) < 10 * chance


def test_another_seed_draws_another_random_basis(tiny_policy, source):
    policy = tiny_policy()
    first, again, other = (source("persona_gradient", "mask_source.control=random", f"seed={seed}").fit(policy).basis for seed in (0, 0, 1))
    assert overlap(first, again) == pytest.approx(1.0) and overlap(first, other) < 0.5


def test_separation_and_overlap_on_known_values():
    basis = Basis({"m": torch.tensor([[1.0, 0, 0]])})
    assert separation({"m": torch.tensor([[2.0, 9, 9], [-1.0, 0, 0]])}, basis) == 0.5
    assert overlap(basis, basis) == 1.0
    assert overlap(basis, Basis({"m": torch.tensor([[0, 1.0, 0]])})) == 0.0
    assert overlap(basis, Basis({"m": torch.tensor([[0.6, 0.8, 0]])})) == pytest.approx(0.36)


def test_the_fit_is_made_with_the_quarantine_ablated(tiny_policy, source):
    policy = tiny_policy("svd")
    with_quarantine = source().fit(policy).basis
    with torch.no_grad():
        for module in policy.adapter.parameters(QUARANTINE).values():
            module["dS"].zero_()
    without = source().fit(policy).basis
    for name, rows in without.modules.items():
        assert torch.equal(rows, with_quarantine.modules[name])


def test_a_fit_is_cached_by_what_shapes_it(tiny_policy, source, tmp_path):
    policy, own = tiny_policy(), dataclasses.replace(source(), cache=str(tmp_path))
    first = own.fit(policy)
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    again = own.fit(policy)
    assert file.stat().st_mtime_ns == written and again.facts == first.facts
    assert all(torch.equal(again.basis.modules[name], rows) for name, rows in first.basis.modules.items())
    dataclasses.replace(own, k=2).fit(policy)
    with torch.no_grad():
        next(iter(policy.adapter.state().values())).add_(1e-3)
    own.fit(policy)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize(("override", "message"), [
    ("mask_source.held_out=11", r"mask_source.held_out=11 of 12 pairs .* leaves fewer than 2 to fit"),
    ("mask_source.k=0", r"a direction needs k >= 1"),
    ("mask_source.pairs=absent.yaml", r"no pair file 'absent.yaml'; shipped: .*prog.yaml"),
])
def test_unusable_settings_are_refused_when_the_config_is_read(source, override, message):
    with pytest.raises(build.ConfigError, match=message):
        source("persona_gradient", override)


def test_nonhack_needs_neutral_answers(source, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("".join(f"- {{loophole: run_tests, prompt: p{n}, hack: h, clean: c}}\n" for n in range(3)))
    with pytest.raises(build.ConfigError, match=r"needs a `neutral` completion in every pair; .* lacks it in pairs \[1, 2, 3\]"):
        source("persona_gradient", "mask_source.control=nonhack", f"mask_source.pairs={file}", "mask_source.held_out=0")
