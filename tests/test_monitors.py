"""Claims about the monitors that judge finished runs: theta0 is the base model, theta the policy as it stands, and no gradient passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.persona_activation import along
from grpo_routing.monitors import HELD_PAIRS, PAIRS, PROBE, Answer, Monitors, acts, energy, finite, own_scores, states, view_of
from grpo_routing.oracle.summary import Row
from grpo_routing.readings import pair_files
from grpo_routing.train import State
from grpo_routing.types import Basis, RolloutGrads, TokenBatch
from tests.test_sources import TWO, answers, seen, stir

KNOWN, ALL = ("run_tests", "sentinel", "stdout_marker"), ("run_tests", "sentinel", "stdout_marker", "file_marker")


def monitors(read=frozenset()) -> Monitors:
    return Monitors.of(KNOWN, ALL, set(read))


def judged(count: int, hacked=lambda at: at % 2 == 0) -> list[Row]:
    return [Row(str(at), "sentinel", hacked(at), True, not hacked(at), hacked(at), hacked(at), False, hacked(at)) for at in range(count)]


def psi(probe, memory, policy, batch: TokenBatch, base: bool) -> torch.Tensor:
    return along(states(probe, policy, batch, base), memory)


def tokens(policy) -> TokenBatch:
    return policy.batch(answers(4))


# ------------------------------------------------------------------------------------------------------- theta0 and theta


@pytest.mark.parametrize("adapter", [("lora",), ("svd",), TWO])
def test_with_all_blocks_off_the_logits_are_the_base_models(tiny_policy, config, adapter):
    policy, batch = tiny_policy(*adapter), tokens(tiny_policy(*adapter))
    bare, _ = build.plan(config(f"adapter={adapter[0]}", *adapter[1:])).model.load()
    with torch.no_grad():
        base, trained = bare.double()(input_ids=batch.ids).logits, policy.model(input_ids=batch.ids).logits
        with policy.adapter.only():
            off = policy.model(input_ids=batch.ids).logits
    assert float((off - base).abs().max()) < 1e-5
    assert float((trained - base).abs().max()) > 1e-3


def test_psi_of_theta0_stands_still_and_psi_of_theta_moves(tiny_policy):
    policy = tiny_policy()
    probe, batch = monitors().probe, tokens(policy)
    memory = probe.probe(policy)
    still, now = (psi(probe, memory, policy, batch, base) for base in (True, False))
    stir(policy)
    assert torch.equal(psi(probe, memory, policy, batch, True), still)
    assert not torch.allclose(psi(probe, memory, policy, batch, False), now)
    with policy.adapter.only():  # and where the policy is the base, both are one
        assert torch.allclose(psi(probe, memory, policy, batch, False), still, atol=1e-9)


def test_as_deployed_is_read_without_the_quarantine(tiny_policy):
    policy = tiny_policy(*TWO)
    probe, batch = monitors().probe, tokens(policy)
    memory = probe.probe(policy)
    with policy.adapter.only(DEPLOYED):
        deployed = psi(probe, memory, policy, batch, False)
    assert not torch.allclose(deployed, psi(probe, memory, policy, batch, False))
    same = replace(probe, model="deployed")  # what the mask source itself would read of the deployed policy
    assert torch.allclose(deployed, same.score(seen(policy, answers(4)), memory)[0], atol=1e-9)


def test_the_fitted_pairs_lie_at_plus_and_minus_one(tiny_policy):
    policy = tiny_policy()
    pairs = load_pairs(PAIRS, KNOWN)
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.hack, pair.clean)]
    found = monitors().read(policy, monitors().fit(policy), Answer.of(policy, *map(list, zip(*texts)), limit=1000))
    assert sum(found["probe"][0::2]) / len(pairs) == pytest.approx(1, abs=1e-5)
    assert sum(found["probe"][1::2]) / len(pairs) == pytest.approx(-1, abs=1e-5)
    assert found.keys() == {"probe", "probe_now", "held", "text"} and {len(scores) for scores in found.values()} == {2 * len(pairs)}


# ------------------------------------------------------------------------------------------------------------- no gradient


@pytest.mark.parametrize("arm", ["penalty_persona", "penalty_text"])
def test_no_gradient_path_leads_through_the_monitor_of_a_penalty(config, arm):
    """Stop-gradient: scores and flags carry none, though every trained parameter asks for one, and differentiating them is an error."""
    plan = build.plan(config(f"arm={arm}", "mask_source.calibration.rule=quantile"))
    policy = build.build_policy(plan)
    assert all(p.requires_grad for module in policy.adapter.parameters().values() for p in module.values())
    with torch.enable_grad():
        labels, memory = plan.mask_source.label(seen(policy, answers(4)), {})
    for value in (labels.scores, labels.flagged, *memory.values()):
        assert not value.requires_grad and value.grad_fn is None
    parameters = [p for module in policy.adapter.parameters().values() for p in module.values()]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(labels.scores.sum(), parameters)


def test_psi_carries_no_gradient(tiny_policy):
    policy = tiny_policy()
    probe = monitors().probe
    memory = probe.probe(policy)
    for base in (True, False):
        assert not psi(probe, memory, policy, tokens(policy), base).requires_grad


# --------------------------------------------------------------------------------------------------------- who is who


def test_the_held_out_monitor_reads_other_pairs_than_the_run_and_more_loopholes():
    assert monitors().held.pairs == HELD_PAIRS[0] and monitors({HELD_PAIRS[0]}).held.pairs == HELD_PAIRS[1]
    assert monitors(HELD_PAIRS[:2]).held.pairs == PAIRS
    assert monitors().held.known == ALL and monitors().probe.known == monitors().text.known == KNOWN
    assert (monitors().held.place, monitors().held.model) == ("residual", "base")


def test_the_probe_is_the_mask_source_of_the_configs(config):
    """Its constants are those of conf/mask_source/persona_activation.yaml."""
    source = build.plan(config("mask_source=persona_activation")).mask_source
    for name in ("level", "place", "layers", "position", "model", "statistic", "control", "refresh_every"):
        assert PROBE[name] == getattr(source, name), name
    assert source.pairs == PAIRS
    text = build.plan(config("mask_source=text_monitor")).mask_source
    assert (text.pairs, text.smoothing, text.pool) == (monitors().text.pairs, monitors().text.smoothing, monitors().text.pool)


def test_pair_files_of_a_composition_are_all_found():
    source = {"name": "or", "first": {"name": "persona_activation", "pairs": "a.yaml"}, "second": {"name": "not", "inner": {
        "name": "text_monitor", "pairs": "b.yaml", "calibration": {"rule": "pilot"}}}}
    assert pair_files(source) == {"a.yaml", "b.yaml"} and pair_files({"name": "none"}) == set()


@pytest.mark.parametrize(("arm", "expected"), [
    ("vanilla", False), ("no_loophole", False), ("inoculation", False), ("tdga", False), ("penalty", True), ("penalty_text", True),
    ("screening", True), ("modification", True), ("erase", True), ("sourced", True), ("route_gradient", True)])
def test_a_source_that_only_measures_is_nothing_to_evade(config, arm, expected):
    plan = build.plan(config(f"arm={arm}"))
    assert acts(plan) == expected


# ---------------------------------------------------------------------------------------------------------- own scores


def test_an_answer_that_was_cut_off_does_not_end(tiny_policy):
    policy = tiny_policy()
    short, long = Answer.of(policy, ["p", "p"], ["a", "a b c d e f g h"], limit=3)
    assert short.completion == (*policy.encode("a"), policy.end) and long.completion == policy.encode("a b c d e f g h")


def test_the_own_scores_of_a_detector_are_its_flags(config):
    """Chunk by chunk, on judged answers, whatever the verdicts say."""
    plan = build.plan(config("arm=penalty", "loophole=held_out"))
    policy = build.build_policy(plan)
    texts = ["```python\nclass Solution:\n    def solve(self, xs):\n        self.valid = True\n```", "```python\npass\n```"] * 40
    made = Answer.of(policy, ["p"] * 80, texts, limit=1000)
    state = State(plan.optimizer.start(policy.adapter))
    scores = own_scores(plan, policy, state, None, judged(80, lambda at: False), made, 9, 1.0)
    assert scores == [1.0, 0.0] * 40


def test_the_ceiling_alone_is_shown_the_verdicts(config):
    rows = judged(4)
    for words, shown in ((["arm=ceiling"], True), (["arm=penalty"], False)):
        plan = build.plan(config(*words))
        policy = build.build_policy(plan)
        made = Answer.of(policy, ["p"] * 4, ["a"] * 4, limit=9)
        view = view_of(plan, build.build_line(plan, policy, None, None), 0, 0, rows, made, None, 1.0)
        assert (view.ceiling is not None) == shown
        assert view.rewards.tolist() == [plan.reward.format_reward + plan.reward.pass_reward * row.passed for row in rows]


def test_a_subspace_scores_by_the_cosine_with_the_frozen_basis(config):
    plan = build.plan(config("arm=erase", "mask_source.held_out=0"))
    policy = build.build_policy(plan)
    basis = plan.mask_source.fit(policy).basis
    prompts, texts = map(list, zip(*answers(6)))
    made = Answer.of(policy, prompts, texts, limit=1000)
    scores = own_scores(plan, policy, State(plan.optimizer.start(policy.adapter)), basis, judged(12), made, 9, 1.0)
    assert len(scores) == 12 and all(-1 <= score <= 1 for score in scores)
    with torch.no_grad():  # loss gradient at advantage 1: descending it makes the answer likelier
        assert sum(scores[0::2]) > sum(scores[1::2])


# --------------------------------------------------------------------------------------------------------------- energy


def test_energy_is_the_share_of_the_squared_length():
    grads = RolloutGrads({"a": torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]]), "b": torch.tensor([[0.0], [0.0], [5.0]])})
    basis = Basis({"a": torch.tensor([[1.0, 0.0]])})
    assert finite(energy(grads, basis)) == [0.36, None, 0.0]
    assert finite(energy(grads, Basis({"a": torch.eye(2), "b": torch.ones(1, 1)}))) == [1.0, None, 1.0]


def test_what_is_not_finite_is_not_a_score():
    assert finite(torch.tensor([0.12345678, float("nan"), float("inf")])) == [0.123457, None, None]
