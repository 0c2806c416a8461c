"""Claims about the sources that score rollouts, what they look at, and how they are composed.

T9 is the property test of graft.md §6.1. Fingerprints have a file of their own (test_fingerprint.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_routing import build
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.env.grader import Grade
from grpo_routing.env.loopholes import LOOPHOLES, fenced, solution_text
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.ceiling import Ceiling
from grpo_routing.mask_sources.composition import And, Budget, Delay, Not, Or
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.mask_sources.direction import StaleBasisError
from grpo_routing.mask_sources.fingerprint import Fingerprint
from grpo_routing.mask_sources.logp_gap import LogpGap
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.persona_activation import PersonaActivation
from grpo_routing.mask_sources.persona_gradient import PersonaGradient
from grpo_routing.mask_sources.quarantine_activity import QuarantineActivity
from grpo_routing.mask_sources.reward_quantile import RewardQuantile
from grpo_routing.mask_sources.self_report import SelfReport
from grpo_routing.mask_sources.view import StepView
from grpo_routing.projections.erase import Erase
from grpo_routing.train import State, pilot, train_step
from grpo_routing.types import STUDENT, Rollout, TokenBatch
from tests.test_calibration import F64, calibration, randoms, stage, tensor
from tests.test_controls import KNOWN, PAIRS, activation
from tests.test_fingerprint import fingerprint

TWO = ("lora", "adapter.rank=4", "adapter.quarantine_rank=3")


def persona(cache, **change) -> PersonaGradient:
    return PersonaGradient(**{"control": "none", "seed": 0, "calibration": calibration(), **PAIRS, "level": "rollout", "measure": "cosine",
                              "advantage": "unit", "k": 2, "per_loophole": False, "tau": 0.0, "floor": 0.0, "micro_batch": 64,
                              "cache": str(cache)} | change)


def answers(count: int = 12) -> list[tuple[str, str]]:
    """(prompt, answer) of the first pairs, hack and clean by turns."""
    return [(pair.prompt, text) for pair in load_pairs("prog.yaml", KNOWN)[:count] for text in (pair.hack, pair.clean)]


def seen(policy, texts, group=4, rewards=None, step=0, grads=False) -> StepView:
    """A step of these (prompt, answer), in the order of the prompts, with the gradients of advantage 1 when asked for."""
    prompts = policy.encode_prompts([prompt for prompt, _ in texts])
    rollouts = [Rollout(place // group, prompt, (*policy.encode(text), policy.end), text, STUDENT)
                for place, (prompt, (_, text)) in enumerate(zip(prompts, texts))]
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], policy.pad)
    ones = torch.ones(len(texts), dtype=F64)
    own = rollout_gradients(policy, tokens, ones, PolicyLoss(0.2, 0.0, 100), 64).grads[DEPLOYED] if grads else None
    return StepView(step, rollouts, tokens, torch.zeros(len(texts), dtype=F64) if rewards is None else rewards, policy, None, own)


@torch.no_grad()
def stir(policy, block=DEPLOYED, size=0.3, only=None):
    generator = torch.Generator().manual_seed(8)
    for module in policy.adapter.parameters(block).values():
        for name, value in module.items():
            if only in (None, name):
                value.add_(size * torch.randn(value.shape, generator=generator))


@torch.no_grad()
def zeroed(policy, block=QUARANTINE):
    for module in policy.adapter.parameters(block).values():
        module["B"].zero_()


@torch.no_grad()
def by_hand(policy, view) -> torch.Tensor:
    """Log-probability of every completion token from the model's own logits, zero elsewhere, [B, T-1]."""
    logits = torch.log_softmax(policy.model(input_ids=view.tokens.ids).logits[:, :-1], -1)
    return logits.gather(2, view.tokens.ids[:, 1:, None]).squeeze(2) * view.tokens.completion_mask


# --------------------------------------------------------------------------------------------------- persona_activation


def test_on_the_scale_of_the_score_the_pairs_lie_at_plus_and_minus_one(tiny_policy):
    """Means of the pairs' hacks and clean answers, for either place and statistic; and hacks lie above their own clean answer."""
    policy = tiny_policy()
    for change in ({}, {"statistic": "t"}, {"place": "coordinates"}, {"model": "deployed", "position": "last", "layers": (1,)}):
        scores, memory = activation(**change).score(seen(policy, answers()), {})
        hacks, clean = scores[0::2], scores[1::2]
        assert float(hacks.mean()) == pytest.approx(1.0, abs=1e-6) and float(clean.mean()) == pytest.approx(-1.0, abs=1e-6), change
        assert float((hacks > clean).double().mean()) >= (0.75 if change.get("position") != "last" else 0.5), change
        assert bool((memory["scale"] > 0).all())


def test_held_out_pairs_measure_and_fit_nothing(tiny_policy):
    policy, source = tiny_policy(), activation(held_out=3)
    memory, reserved = source.probe(policy), source.reserved(12)
    scores, _ = source.score(seen(policy, answers()), memory)
    margin = (scores[0::2] - scores[1::2])[reserved]
    assert float(memory["separation"]) == pytest.approx(float((margin > 0).double().mean()))
    assert source.facts(memory) == {"separation_held_out": float(memory["separation"])}
    fitted = [row for row in range(12) if row not in reserved]
    assert float(scores[0::2][fitted].mean()) == pytest.approx(1.0, abs=1e-6) and len(reserved) == 3


def test_a_planted_direction_is_the_direction(tiny_policy, tmp_path):
    """Pairs that differ by one token: at the embedding the direction is that of its vectors, and what holds the token scores high."""
    policy = tiny_policy()
    file = tmp_path / "planted.yaml"
    file.write_text("".join(f'- {{loophole: none, prompt: "p {w}", hack: "{w} pass", clean: "{w} return"}}\n' for w in "abcdef"))
    source = activation(pairs=str(file), layers=(0,))
    memory = source.probe(policy)
    table, rows = policy.model.get_input_embeddings().weight.detach(), []
    for word in "abcdef":
        hack, clean = (table[[*policy.encode(f"{word} {last}"), policy.end]].mean(0) for last in ("pass", "return"))
        rows.append(torch.nn.functional.normalize(hack - clean, dim=0))
    assert torch.allclose(memory["v/0"], torch.nn.functional.normalize(sum(rows), dim=0), atol=1e-6)
    scores, _ = source.score(seen(policy, [("q", "g pass"), ("q", "g return"), ("q", "pass pass"), ("q", "return return")]), memory)
    assert scores[0] > scores[1] and scores[2] > scores[3]


def test_the_t_statistic_weighs_coordinates_by_their_standard_error(tiny_policy):
    policy, source = tiny_policy(), activation(statistic="t", layers=(1,))
    h = source.activations(policy, policy.batch(answers()))["1"].double()
    rows = torch.nn.functional.normalize(h[0::2] - h[1::2], dim=1)
    t = rows.mean(0) / (rows.var(0) / len(rows)).sqrt()
    assert torch.allclose(source.probe(policy)["v/1"], t / t.norm(), atol=1e-9)


def test_a_probe_that_tells_no_pair_apart_is_refused(tiny_policy):
    """Every answer ends in the same token, so its embedding is no direction. Beside a layer that has one it may stand."""
    policy = tiny_policy()
    with pytest.raises(ValueError, match="pairs give no direction in place 0: .* Choose others with mask_source.layers"):
        activation(position="last", layers=(0,)).probe(policy)
    memory = activation(position="last", layers=(0, 1)).probe(policy)
    assert not memory["v/0"].any() and memory["v/1"].any()


def test_position_last_is_the_last_token_of_the_completion(tiny_policy):
    policy = tiny_policy()
    view = seen(policy, [("a", "x = 1"), ("a long prompt", "y")])
    states = policy.model.model(input_ids=view.tokens.ids, output_hidden_states=True).hidden_states
    with policy.adapter.only():
        frozen = policy.model.model(input_ids=view.tokens.ids, output_hidden_states=True).hidden_states
    ends = [len(r.prompt_ids) + len(r.completion_ids) - 1 for r in view.rollouts]
    for model, expected in (("deployed", states), ("base", frozen)):
        own = activation(position="last", model=model).activations(policy, view.tokens)
        for layer in (0, 1):
            assert torch.allclose(own[str(layer)], torch.stack([expected[layer][row, end] for row, end in enumerate(ends)]), atol=1e-6)
        mean = activation(model=model).activations(policy, view.tokens)["1"]
        starts = [len(r.prompt_ids) for r in view.rollouts]
        by_row = [expected[1][row, start : end + 1].mean(0) for row, (start, end) in enumerate(zip(starts, ends))]
        assert torch.allclose(mean, torch.stack(by_row), atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "svd"])
def test_coordinates_are_what_a_module_reads_in_the_blocks_own_axes(tiny_policy, adapter):
    policy = tiny_policy(adapter)
    view, inner = seen(policy, answers(2)), policy.model.model
    name = "model.layers.0.self_attn.q_proj"
    x = inner.layers[0].input_layernorm(inner.embed_tokens(view.tokens.ids))
    module = policy.adapter.modules[name]
    axes = module.blocks[DEPLOYED]["A"] if adapter == "lora" else module.vh_deployed
    share = view.tokens.completion_mask.double() / view.tokens.completion_mask.sum(1, keepdim=True)
    expected = torch.einsum("bt,btr->br", share, (x @ axes.T)[:, 1:])
    own = activation(place="coordinates").activations(policy, view.tokens)
    assert torch.allclose(own[name], expected, atol=1e-6) and own.keys() == policy.adapter.modules.keys()


def test_the_base_model_does_not_move_and_the_deployed_one_does(tiny_policy):
    policy = tiny_policy(*TWO)
    view, sources = seen(policy, answers(3)), {model: activation(model=model) for model in ("base", "deployed")}

    def states():
        return {model: source.activations(policy, view.tokens)["1"] for model, source in sources.items()}

    before = states()
    stir(policy, QUARANTINE)
    after = states()
    assert torch.equal(after["base"], before["base"]) and torch.equal(after["deployed"], before["deployed"]), "the quarantine is ablated"
    stir(policy)
    after = states()
    assert torch.equal(after["base"], before["base"]) and not torch.allclose(after["deployed"], before["deployed"], atol=1e-3)


def test_coordinates_of_the_base_model_stand_still_for_svd_and_turn_with_loras_a(tiny_policy):
    source = activation(place="coordinates")
    for adapter, parameter, moves in (("svd", None, False), ("lora", "B", False), ("lora", "A", True)):
        policy = tiny_policy(adapter)
        view = seen(policy, answers(2))
        before = source.activations(policy, view.tokens)
        stir(policy, only=parameter)
        after = source.activations(policy, view.tokens)
        assert all(torch.equal(after[name], h) for name, h in before.items()) is not moves


def test_a_base_direction_is_fitted_once_and_a_deployed_one_again(tiny_policy):
    policy, view = tiny_policy(), None
    for model, again in (("base", False), ("deployed", True)):
        source = activation(model=model, refresh_every=2, overlap_floor=0.0)
        _, memory = source.score(seen(policy, answers(2)), {})
        stir(policy)
        view = seen(policy, answers(2), step=1)
        _, later = source.score(view, memory)
        assert torch.equal(later["v/1"], memory["v/1"]), "not due yet"
        _, later = source.score(replace(view, step=2), memory)
        assert torch.equal(later["v/1"], memory["v/1"]) is not again
        assert ("fit_overlap" in source.facts(later)) is again


def test_the_basis_of_lora_is_every_output_times_the_direction(tiny_policy):
    """Rows e_o x v in the numbers of B. What is left of the gradient of B has nothing along v, and A keeps its own."""
    policy = tiny_policy()
    source = activation(level="gradient", place="coordinates")
    basis, probe = source.fit(policy).basis, source.probe(policy)
    sizes = {name: (module["A"].numel(), *module["B"].shape) for name, module in policy.adapter.parameters().items()}
    summed = seen(policy, answers(3), grads=True).grads.summed()
    kept = Erase("gradient", "no_gate", 1.0, False).gradient({DEPLOYED: summed}, basis)[DEPLOYED]
    assert basis.modules.keys() == sizes.keys() and source.kind == "subspace"
    for name, (start, d_out, rank) in sizes.items():
        rows, v = basis.modules[name], probe[f"v/{name}"]
        assert torch.equal(rows, torch.cat([rows.new_zeros(d_out, start), torch.kron(torch.eye(d_out, dtype=F64), v[None])], 1))
        b, left = summed[name][start:].view(d_out, rank), kept[name][start:].view(d_out, rank)
        assert float((left @ v).abs().max()) < 1e-12 * float(b.norm()) and float((b @ v).norm()) > 1e-3 * float(b.norm())
        assert torch.allclose(left, b - torch.outer(b @ v, v), atol=1e-15)
        assert torch.equal(kept[name][:start], summed[name][:start])


def test_the_basis_of_svd_is_the_direction_itself(tiny_policy):
    policy = tiny_policy("svd")
    source = activation(level="gradient", place="coordinates")
    basis, probe = source.fit(policy).basis, source.probe(policy)
    assert all(torch.equal(rows, probe[f"v/{name}"][None]) for name, rows in basis.modules.items())
    labels, memory = source.label(seen(policy, answers(1)), {})
    assert not labels.flagged.any() and memory == {}, "a subspace marks no rollout"


@pytest.mark.parametrize(("change", "message"), [
    ({"level": "token"}, "mask_source.level must be gradient or rollout; got 'token'"),
    ({"place": "logits"}, "mask_source.place must be residual or coordinates; got 'logits'"),
    ({"position": "first"}, "mask_source.position must be mean or last or prompt_last; got 'first'"),
    ({"model": "trained"}, "mask_source.model must be base or deployed; got 'trained'"),
    ({"statistic": "pca"}, "mask_source.statistic must be mean or t; got 'pca'"),
    ({"layers": ()}, "mask_source.place=residual needs some mask_source.layers"),
    ({"level": "gradient"}, "mask_source.level=gradient needs mask_source.place=coordinates"),
    ({"held_out": 11}, r"mask_source.held_out=11 of 12 pairs .* leaves fewer than 2 to fit"),
    ({"refresh_every": -1}, "a refit needs refresh_every >= 0"),
    ({"overlap_floor": 1.5}, "overlap_floor in \\[0, 1\\]"),
    ({"when_stale": "ignore"}, "when_stale warn or stop; got 0, 0.2 and 'ignore'"),
])
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        activation(**change)


def test_an_adapter_without_coordinates_is_refused(config):
    words = ("projection=erase", "mask_source=persona_activation", "mask_source.place=coordinates", "adapter=mlp")
    with pytest.raises(build.ConfigError, match="reads activations in the adapter's own coordinates, and adapter=mlp has none"):
        build.plan(config(*words))


# ----------------------------------------------------------------------------------------------------- persona_gradient


def test_hacks_of_the_pairs_score_above_their_clean_answers_by_gradient(tiny_policy, tmp_path):
    policy = tiny_policy()
    scores, _ = persona(tmp_path).score(seen(policy, answers(), grads=True), {})
    assert float((scores[0::2] > scores[1::2]).double().mean()) >= 0.75 and bool((scores.abs() <= 1).all())


def test_a_dot_product_is_the_cosine_times_the_length_and_live_times_the_centred_reward(tiny_policy, tmp_path):
    policy, rewards = tiny_policy(), tensor([1, 0, 0.25, 0, 1, 1, 1, 1])
    view = seen(policy, answers(4), rewards=rewards, grads=True)
    found = {(measure, advantage): persona(tmp_path, measure=measure, advantage=advantage).score(view, {})[0]
             for measure in ("cosine", "dot") for advantage in ("unit", "live")}
    assert torch.allclose(found["dot", "unit"], found["cosine", "unit"] * view.grads.norms(), rtol=1e-10)
    centred = torch.cat([rewards[:4] - rewards[:4].mean(), torch.zeros(4, dtype=F64)])
    for measure in ("cosine", "dot"):
        assert torch.allclose(found[measure, "live"], found[measure, "unit"] * centred, rtol=1e-10)
    labels, _ = persona(tmp_path, advantage="live", calibration=calibration(rule="threshold")).label(view, {})
    assert not labels.flagged[4:].any(), "a group that is paid alike follows nothing"


def test_what_has_no_gradient_has_no_score(tiny_policy, tmp_path):
    policy = tiny_policy()
    view = seen(policy, answers(4), grads=True)
    for rows in view.grads.modules.values():
        rows[3] = 0
    labels, _ = persona(tmp_path, calibration=calibration(share=1.0)).label(view, {})
    assert labels.scores[3].isnan() and labels.flagged.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


# ------------------------------------------------------------------------------------------------- rewards, own report


def test_the_best_paid_are_flagged():
    labels, _ = RewardQuantile("none", 0, calibration()).label(stage(8, rewards=tensor([0, 1, 0.25, 1.25, 0, 0.5, 1.25, 0])), {})
    assert labels.flagged.nonzero().flatten().tolist() == [3, 6]
    assert RewardQuantile.reads == ("rewards",)


def test_self_report_is_the_log_odds_of_the_models_own_answer(tiny_policy):
    policy = tiny_policy()
    source = SelfReport("none", 0, calibration(), "\n# cheated?\n", "yes", "no")
    view = seen(policy, [("a = 1", "b = 2"), ("long prompt", "c")])
    cut = Rollout(0, policy.encode("a"), policy.encode("unfinished"), "unfinished", STUDENT)  # ran into the token limit: no end token
    view = replace(view, rollouts=[*view.rollouts, cut])
    scores, _ = source.score(view, {})
    for row, rollout in enumerate(view.rollouts):
        own = [token for token in rollout.completion_ids if token != policy.end]
        start, expected = [*rollout.prompt_ids, *own, *policy.encode("\n# cheated?\n")], []
        for said in ("yes", "no"):
            ids = torch.tensor([[*start, *policy.encode(said)]])
            logits = torch.log_softmax(policy.model(input_ids=ids).logits[0], -1).detach()
            expected.append(sum(float(logits[at - 1, ids[0, at]]) for at in range(len(start), ids.shape[1])))
        assert float(scores[row]) == pytest.approx(expected[0] - expected[1], abs=1e-6)
    assert source.reads == ("own report",)


@pytest.mark.parametrize("change", [{"question": ""}, {"affirmed": ""}, {"denied": ""}, {"denied": "yes"}])
def test_a_report_needs_a_question_and_two_answers(change):
    with pytest.raises(ValueError, match="self_report needs a question and two different answers"):
        SelfReport("none", 0, calibration(), **{"question": "?", "affirmed": "yes", "denied": "no"} | change)


# ------------------------------------------------------------------------------------------------------- the quarantine


def test_a_quarantine_at_zero_says_nothing(tiny_policy):
    policy = tiny_policy(*TWO)
    zeroed(policy)
    for kind in (QuarantineActivity, LogpGap):
        labels, _ = kind("none", 0, calibration(share=0.5, trusted_share=0.5)).label(seen(policy, answers(2)), {})
        assert labels.scores.isnan().all() and not labels.flagged.any() and not labels.trusted.any()
        assert kind.needs_quarantine
    stir(policy, QUARANTINE, 0.1)
    for kind in (QuarantineActivity, LogpGap):
        labels, _ = kind("none", 0, calibration(share=0.5)).label(seen(policy, answers(2)), {})
        assert labels.scores.isfinite().all() and int(labels.flagged.sum()) == 2


def test_the_gap_is_that_of_two_forwards(tiny_policy):
    policy = tiny_policy(*TWO)
    view = seen(policy, answers(3))
    scores, _ = LogpGap("none", 0, calibration()).score(view, {})
    both = by_hand(policy, view)
    zeroed(policy)
    gap = (both - by_hand(policy, view)).sum(1) / view.tokens.completion_mask.sum(1)
    assert torch.allclose(scores, gap, atol=1e-6) and float(scores.std()) > 1e-3


def test_activity_is_the_mean_length_of_the_quarantines_branch(tiny_policy):
    """Whatever the forward scale at which the rollout is scored: the branch is read at scale 1."""
    policy = tiny_policy(*TWO)
    view, inputs = seen(policy, answers(3)), {}
    source = QuarantineActivity("none", 0, calibration())
    scores, _ = source.score(view, {})
    handles = [module.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0]))
               for name, module in policy.adapter.modules.items()]
    with torch.no_grad():
        policy.model(input_ids=view.tokens.ids)
    for handle in handles:
        handle.remove()
    own, mask = policy.adapter.parameters(QUARANTINE), view.tokens.completion_mask
    lengths = torch.stack([(2.0 * x @ own[name]["A"].T @ own[name]["B"].T).norm(dim=-1)[:, 1:] for name, x in inputs.items()]).mean(0)
    assert torch.allclose(scores, ((lengths * mask).sum(1) / mask.sum(1)).detach(), atol=1e-6)
    assert not any(module._forward_pre_hooks for module in policy.adapter.modules.values()), "nothing keeps watching"
    with torch.no_grad():
        for module in own.values():
            module["B"].mul_(2)
    with policy.adapter.only():  # inputs of the frozen model; the branch is there all the same
        frozen, _ = source.score(view, {})
    assert bool((frozen > 0).all())


def test_sources_of_the_quarantine_need_one(config):
    for source in (QuarantineActivity, LogpGap):
        assert source.needs_quarantine
    words = ("projection=erase", "advantage=balanced", "mask_source=logp_gap")
    with pytest.raises(build.ConfigError, match="mask_source=logp_gap reads the quarantine block; adapter=lora has none as configured"):
        build.plan(config(*words))
    build.plan(config(*words, "adapter.quarantine_rank=2"))


# ------------------------------------------------------------------------------------------------------------- the oracle


def test_the_ceiling_flags_exactly_what_it_is_told():
    truth = tensor([0, 1, 1, 0, 0, 0, 0, 1])
    labels, _ = Ceiling("none", 0).label(stage(8, ceiling=lambda: truth), {})
    assert torch.equal(labels.flagged, truth) and not labels.trusted.any() and Ceiling.uses_oracle
    with pytest.raises(RuntimeError, match="mask_source=ceiling was given no oracle; the run must say uses_oracle=true"):
        Ceiling("none", 0).label(stage(8), {})


# --------------------------------------------------------------------------------------------------------- compositions

REWARDS = tensor([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def rewarded(**change) -> RewardQuantile:
    return RewardQuantile("none", 0, calibration(**change))


def detector(known=KNOWN, **change) -> Detector:
    return Detector(**{"control": "none", "seed": 0, "known": known, "recall": 1.0, "false_positive": 0.0, "noise": "iid",
                       "forms": ("plain", "other")} | change)


def text(loophole="none") -> str:
    marker = LOOPHOLES[loophole].markers["train"][0] if loophole in LOOPHOLES else ""
    return fenced(solution_text("solve", "values", ["return 0"], loophole, marker))


def mixed(step=0, rewards=REWARDS) -> StepView:
    """Eight rollouts, of which the last of each group of four and the third pull a known lever."""
    view = stage(8, step=step, rewards=rewards)
    modes = ["run_tests" if place in (2, 3, 7) else "none" for place in range(8)]
    return replace(view, rollouts=[replace(rollout, text=text(mode)) for rollout, mode in zip(view.rollouts, modes)])


HIGH = {"rule": "threshold", "threshold": 0.35, "trusted_threshold": 0.15}  # flags 4 to 7, trusts 0 and 1
SOFT = {"softness": 1.0, "threshold": 0.2, "rule": "threshold"}
COMPOSED = {"control": "none", "seed": 0}


def labels_of(source, view=None, memory=None):
    return source.label(view or mixed(), memory or {})[0]


def test_and_or_not_on_hand_labels():
    one, two = rewarded(**HIGH), detector()
    both, either, negated = And(**COMPOSED, first=one, second=two), Or(**COMPOSED, first=one, second=two), Not(**COMPOSED, inner=one)
    assert labels_of(both).flagged.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert labels_of(both).trusted.tolist() == [True, True] + [False] * 6, "trusted where one trusts and it is not flagged"
    assert labels_of(either).flagged.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert not labels_of(either).trusted.any(), "the detector trusts nobody"
    assert labels_of(Or(**COMPOSED, first=one, second=one)).trusted.tolist() == [True, True] + [False] * 6
    assert labels_of(negated).flagged.tolist() == [1, 1, 1, 1, 0, 0, 0, 0], "what was trusted or unknown is flagged"
    assert not labels_of(negated).trusted.any() and torch.equal(labels_of(negated).scores, -REWARDS)


def test_soft_flags_compose_by_minimum_and_maximum():
    one, two = rewarded(**SOFT), rewarded(**SOFT | {"threshold": 0.5, "softness": 3.0})
    a, b = (labels_of(source).flagged for source in (one, two))
    assert torch.equal(labels_of(And(**COMPOSED, first=one, second=two)).flagged, torch.minimum(a, b))
    assert torch.equal(labels_of(Or(**COMPOSED, first=one, second=two)).flagged, torch.maximum(a, b))
    assert torch.equal(labels_of(Not(**COMPOSED, inner=one)).flagged, 1 - a)
    assert bool((a > b).any()) and bool((a < b).any())


@pytest.mark.parametrize("parts", [
    (HIGH, {}), (SOFT, {"rule": "group", "share": 0.5, "trusted_share": 0.25}), (SOFT, SOFT | {"softness": 3.0})])
def test_de_morgan(parts):
    a, b = (rewarded(**settings) for settings in parts)
    nots = {"first": Not(**COMPOSED, inner=a), "second": Not(**COMPOSED, inner=b)}
    for outer, inner in ((Or, And), (And, Or)):
        negated = labels_of(Not(**COMPOSED, inner=outer(**COMPOSED, first=a, second=b)))
        assert torch.equal(negated.flagged, labels_of(inner(**COMPOSED, **nots)).flagged)
        assert torch.equal(negated.trusted, labels_of(inner(**COMPOSED, **nots)).trusted)


def test_delay_is_silent_before_its_start_and_listens_all_the_while():
    inner = rewarded(rule="history", decay=0.5, trusted_share=0.25)
    source, memory, alone = Delay(**COMPOSED, inner=inner, start=2), {}, {}
    for step in range(4):
        view = mixed(step, randoms(8, step))
        labels, memory = source.label(view, memory)
        expected, alone = inner.label(view, alone)
        assert torch.equal(memory["inner/history"], alone["history"]) and torch.equal(labels.scores, expected.scores)
        if step < 2:
            assert not labels.flagged.any() and not labels.trusted.any()
        else:
            assert torch.equal(labels.flagged, expected.flagged) and torch.equal(labels.trusted, expected.trusted)


@pytest.mark.parametrize(("share", "expected"), [(0.0, []), (0.25, [6, 7]), (0.5, [4, 5, 6, 7]), (1.0, [3, 4, 5, 6, 7])])
def test_a_budget_is_spent_on_the_highest_flags_and_then_scores(share, expected):
    hard = rewarded(rule="threshold", threshold=0.25, trusted_threshold=0.05)
    labels = labels_of(Budget(**COMPOSED, inner=hard, share=share))
    assert labels.flagged.nonzero().flatten().tolist() == expected and labels.trusted.tolist() == [True] + [False] * 7
    soft = rewarded(**SOFT)
    labels = labels_of(Budget(**COMPOSED, inner=soft, share=share))
    allowed = torch.arange(8) >= 8 - round(8 * share)
    assert torch.equal(labels.flagged, torch.where(allowed, labels_of(soft).flagged, 0.0))


def test_a_budget_of_flags_without_scores_is_exact_too():
    labels = labels_of(Budget(**COMPOSED, inner=detector(), share=0.25))
    assert labels.flagged.nonzero().flatten().tolist() == [2, 3], "of equal flags the earlier"


def test_the_memories_of_the_parts_are_kept_apart():
    a, b = rewarded(rule="history", share=0.5), rewarded(rule="history", share=0.125, decay=0.5)
    source = Or(**COMPOSED, first=a, second=And(**COMPOSED, first=b, second=detector()))
    memory, one, two = {"other": tensor(1)}, {}, {}
    for step in range(3):
        view = mixed(step, randoms(8, step))
        labels, memory = source.label(view, memory)
        first, one = a.label(view, one)
        second, two = b.label(view, two)
        assert memory.keys() == {"other", "first/history", "second/first/history"}
        assert torch.equal(memory["first/history"], one["history"]) and torch.equal(memory["second/first/history"], two["history"])
        assert torch.equal(labels.flagged, torch.maximum(first.flagged, torch.minimum(second.flagged, labels_of(detector(), view).flagged)))


def test_each_part_gets_as_much_of_the_pilot_as_it_asked_for():
    a, b = rewarded(rule="pilot", pilot=1), rewarded(rule="pilot", pilot=3, share=0.5)
    source = And(**COMPOSED, first=a, second=Not(**COMPOSED, inner=b))
    views = [mixed(step, randoms(8, step + 3)) for step in (-3, -2, -1)]
    assert source.pilot_batches == 3
    memory = source.prepare(views)
    assert memory.keys() == {"first/cut", "first/trusted_cut", "second/inner/cut", "second/inner/trusted_cut"}
    assert memory["first/cut"] == a.prepare(views[:1])["cut"] and memory["second/inner/cut"] == b.prepare(views)["cut"]
    _, after = source.label(mixed(), memory)
    assert after == memory


def test_a_composition_is_what_it_is_made_of(tmp_path):
    gradient = persona(tmp_path, known=("run_tests", "sentinel"), calibration=calibration(rule="pilot", pilot=4))
    coordinates = activation(place="coordinates", calibration=calibration(rule="pilot", pilot=2))
    inner = And(**COMPOSED, first=gradient, second=detector(("stdout_marker", "run_tests")))
    source = Or(**COMPOSED, first=Delay(**COMPOSED, inner=inner, start=1), second=Not(**COMPOSED, inner=coordinates))
    assert source.known == ("run_tests", "sentinel", "stdout_marker")
    assert set(source.reads) == {"pairs", "gradients", "code", "activations"} and len(source.reads) == 4
    assert source.pilot_batches == 4 and source.kind == "rollout"
    assert source.needs_coordinates and not source.needs_quarantine and not source.uses_oracle
    gap = Budget(**COMPOSED, inner=LogpGap("none", 0, calibration()), share=0.5)
    assert gap.needs_quarantine and gap.known == () and not gap.pilot_batches
    assert And(**COMPOSED, first=gap, second=Ceiling("none", 0)).uses_oracle
    assert inner.facts({"first/overlap": tensor(0.5), "second/x": tensor(1)}) == {"fit_overlap": 0.5}


def test_only_sources_of_labels_compose():
    subspace = activation(level="gradient", place="coordinates")
    with pytest.raises(ValueError, match="mask_source.second must label rollouts; PersonaActivation gives a subspace"):
        And(**COMPOSED, first=detector(), second=subspace)
    with pytest.raises(ValueError, match="mask_source.inner must label rollouts"):
        Not(**COMPOSED, inner=subspace)
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"mask_source.share must lie in \[0, 1\]; got {share}"):
            Budget(**COMPOSED, inner=detector(), share=share)


def test_what_a_part_may_not_know_or_read_is_refused_within_a_composition(config):
    composed = config("projection=erase", "advantage=balanced", "loophole=held_out", "mask_source=or")
    source = composed["mask_source"]

    def told(**change):
        return build.plan(composed | {"mask_source": source | change})

    told()
    with pytest.raises(build.ConfigError, match=r"mask_source=or would know the held-out loopholes \['file_marker'\]"):
        told(second=source["second"] | {"known": ["run_tests", "file_marker"]})
    oracle = {"name": "not", **COMPOSED, "inner": {"name": "ceiling", **COMPOSED}}
    with pytest.raises(build.ConfigError, match="mask_source=or reads the truth, which no arm may do unawares"):
        told(first=oracle)
    composed["uses_oracle"] = True
    assert told(first=oracle).mask_source.uses_oracle
    composed["uses_oracle"] = False
    with pytest.raises(build.ConfigError, match="mask_source=or reads the quarantine block"):
        told(first={"name": "logp_gap", **COMPOSED, "calibration": source["first"]["calibration"]})


# ------------------------------------------------------------------------------------------------- through the line


def paid(problems, completions):
    """An environment that pays by length: an untrained policy has groups whose rewards differ."""
    return [Grade(len(text) % 5 / 4, False, True) for text in completions]


def line_of(config, *words):
    plan = build.plan(config("loophole=held_out", "dataset.train_problems=24", "optimizer.warmup_steps=0", *words))
    line = build.build_line(plan, build.build_policy(plan), paid, None)
    return line, State(plan.optimizer.start(line.policy.adapter))


def test_a_pilot_carries_gradients_for_sources_that_read_them(config):
    """Also for a part of a composition; each rollout then has a score before the first step."""
    rule = "calibration.rule=pilot"
    line, _ = line_of(config, "arm=route_gradient", f"mask_source.{rule}", "mask_source.calibration.pilot=1")
    memory = pilot(line)
    assert memory["cut"].isfinite() and any(key.startswith("basis/") for key in memory)
    line, _ = line_of(config, "arm=sourced", "mask_source=not", "mask_source@mask_source.inner=fingerprint",
                      f"mask_source.inner.{rule}", "mask_source.inner.calibration.pilot=1")
    memory = pilot(line)
    assert memory["inner/cut"].isfinite() and len(memory["inner/prints"]) == line.trainer.prompts_per_step * line.trainer.group


def test_a_composition_survives_a_checkpoint_bit_for_bit(config, tmp_path):
    words = ("arm=sourced", "mask_source=or", "mask_source.first.calibration.pilot=1",
             "mask_source@mask_source.second=persona_gradient_rollout",
             "mask_source.second.calibration.rule=history", "mask_source.second.refresh_every=2")
    line, state = line_of(config, *words)
    for _ in range(2):
        train_step(line, state)
    save_checkpoint(tmp_path, line.policy.adapter, state)
    other, fresh = line_of(config, *words)
    assert load_checkpoint(tmp_path, other.policy.adapter, fresh)
    assert {"first/cut", "first/v/1", "second/history"} <= state.memory.keys() == fresh.memory.keys()
    assert all(torch.equal(value, state.memory[key]) and value.dtype == state.memory[key].dtype for key, value in fresh.memory.items())
    one, two = train_step(line, state), train_step(other, fresh)
    assert one["route/fit_overlap"] == two["route/fit_overlap"] and one["route/flagged"] == two["route/flagged"] > 0
    assert other.policy.adapter.fingerprint() == line.policy.adapter.fingerprint()


# -------------------------------------------------------------------------------------------------------- refits and T9


@pytest.mark.parametrize("name", ["persona_gradient", "persona_activation", "fingerprint"])
def test_a_refit_that_shares_too_little_is_warned_about_or_ends_the_run(tiny_policy, tmp_path, caplog, name):
    policy = tiny_policy()

    def source(when_stale, floor):
        change = {"refresh_every": 1, "overlap_floor": floor, "when_stale": when_stale}
        return {"persona_gradient": lambda: persona(tmp_path, **change),
                "persona_activation": lambda: activation(model="deployed", **change),
                "fingerprint": lambda: fingerprint(**change)}[name]()

    view = seen(policy, answers(2), grads=True)
    _, memory = source("stop", 1.0).score(view, {})
    assert not source("stop", 1.0).facts(memory).get("fit_overlap"), "the first fit has none before it"
    stir(policy)
    moved = replace(seen(policy, answers(2), grads=True), step=1)
    with pytest.raises(StaleBasisError, match=r"step 1: the refitted basis shares 0\.\d\d with the one before it .* the floor is 0.999"):
        source("stop", 0.999).score(moved, memory)
    assert not caplog.records
    _, warned = source("warn", 0.999).score(moved, memory)
    assert "between refits it was mostly stale. Lower mask_source.refresh_every" in caplog.text
    assert 0 < source("warn", 0.999).facts(warned)["fit_overlap"] < 0.999
    caplog.clear()
    source("stop", 0.0).score(moved, memory)
    source("stop", 0.999).score(replace(view, step=0), memory)
    assert not caplog.records


def test_t9_scores_follow_the_rewards_only_where_the_source_says_so(tiny_policy, tmp_path):
    policy = tiny_policy(*TWO)
    sources = [activation(), activation(place="coordinates", model="deployed"), persona(tmp_path), persona(tmp_path, advantage="live"),
               fingerprint(), LogpGap("none", 0, calibration()), QuarantineActivity("none", 0, calibration()),
               SelfReport("none", 0, calibration(), "?", "yes", "no"), rewarded()]
    view = seen(policy, answers(4), rewards=torch.arange(8, dtype=F64), grads=True)
    for source in sources:
        straight, turned = (source.label(replace(view, rewards=rewards), {})[0] for rewards in (view.rewards, view.rewards.flip(0)))
        follows = not torch.equal(straight.scores, turned.scores)
        assert follows == ("rewards" in source.reads), type(source).__name__
        assert follows or torch.equal(straight.flagged, turned.flagged)
    assert {type(source) for source in sources} == {PersonaActivation, PersonaGradient, Fingerprint, LogpGap, QuarantineActivity,
                                                    SelfReport, RewardQuantile}
