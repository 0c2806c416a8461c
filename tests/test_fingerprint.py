"""Claims about GRIFT's gradient fingerprints: one sketch for all, honest naming of the clusters, and no score of length alone.

T-C numbers are the tests of baselines.md C8.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.direction import completion_gradients
from grpo_routing.mask_sources.fingerprint import (
    Fingerprint,
    changing_layers,
    clusters,
    fingerprints,
    layer_of,
    named,
    similarity,
    slope,
)
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.view import StepView
from grpo_routing.optimizers import AdamW
from grpo_routing.train import State
from grpo_routing.types import STUDENT, Rollout, RolloutGrads, TokenBatch
from tests.test_calibration import F64, calibration
from tests.test_controls import KNOWN, PAIRS

MODULE = "model.layers.0.q_proj"


def fingerprint(**change) -> Fingerprint:
    return Fingerprint(**{"control": "none", "seed": 0, "calibration": calibration(rule="threshold"), **PAIRS, "layers": 0, "sketch": 64,
                          "window": 512, "temperature": 1.0, "residualise": False, "micro_batch": 64} | change)


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def stage(grads: torch.Tensor, lengths=None, step=0) -> StepView:
    """A step whose only gradients are these rows of one module, with completions of these lengths."""
    lengths = [3] * len(grads) if lengths is None else lengths
    rollouts = [Rollout(place // 4, (1,), (2,) * length, "", STUDENT) for place, length in enumerate(lengths)]
    tokens = TokenBatch.of([(r.prompt_ids, r.completion_ids) for r in rollouts], 0)
    return StepView(step, rollouts, tokens, torch.zeros(len(grads), dtype=F64), None, None, RolloutGrads({MODULE: grads}))


def taught(hack: torch.Tensor, clean: torch.Tensor, source: Fingerprint, pairs: int = 8, noise: float = 0.05) -> dict:
    """Memory of a source whose pairs' gradients lie about these two."""
    rows = torch.stack([hack, clean]).repeat(pairs, 1) + noise * normal(2 * pairs, len(hack), seed=9)
    return {"examples": fingerprints({MODULE: rows}, [0], source.sketch, source.seed).float(), "layers": torch.tensor([0])}


# --------------------------------------------------------------------------------------------------------------- sketch


def test_tc1_the_same_sample_has_the_same_fingerprint(tiny_policy):
    """In the same batch, in another one, and whatever stands beside it: one matrix for all."""
    policy, pair = tiny_policy(), load_pairs("prog.yaml", KNOWN)[0]
    texts = [(pair.prompt, pair.hack), (pair.prompt, pair.clean), (pair.prompt, pair.hack)]
    together = fingerprints(completion_gradients(policy, texts, 8), [0, 1], 256, 0)
    alone = fingerprints(completion_gradients(policy, texts[:1], 1), [0, 1], 256, 0)
    assert torch.allclose(together.norm(dim=1), torch.ones(3, dtype=together.dtype))
    for other in (together[2], alone[0]):
        assert float(together[0] @ other) == pytest.approx(1.0, abs=1e-5)
    assert float(together[0] @ together[1]) < 0.99
    assert not torch.allclose(fingerprints(completion_gradients(policy, texts[:1], 1), [0, 1], 256, 1)[0], alone[0])


def test_tc3_the_sketch_keeps_cosines():
    """Johnson-Lindenstrauss: within 0.1 at width 1024, over two modules that are sketched apart and added."""
    rows = {"model.layers.0.a": normal(12, 900), "model.layers.1.b": normal(12, 1600, seed=1)}
    rows = {name: r + 2 * (torch.arange(12) % 3 == 0).double()[:, None] * r[:1] for name, r in rows.items()}  # some that are alike
    whole = torch.nn.functional.normalize(torch.cat(list(rows.values()), 1), dim=1)
    prints = fingerprints(rows, [0, 1], 1024, 0)
    assert float((prints @ prints.T - whole @ whole.T).abs().max()) < 0.1
    assert float((whole @ whole.T).fill_diagonal_(0).max()) > 0.5
    narrow = fingerprints(rows, [0, 1], 16, 0)
    assert float((narrow @ narrow.T - whole @ whole.T).abs().max()) > 0.2


def test_only_the_chosen_layers_are_read_and_no_gradient_is_no_fingerprint():
    rows = {"model.layers.0.a": normal(3, 10), "model.layers.1.b": normal(3, 20, seed=1)}
    rows["model.layers.0.a"][2] = 0
    assert torch.equal(fingerprints(rows, [0], 32, 0), fingerprints({"model.layers.0.a": rows["model.layers.0.a"]}, [0, 1], 32, 0))
    assert not fingerprints(rows, [0], 32, 0)[2].any()
    assert layer_of("model.layers.12.mlp.up_proj") == 12
    with pytest.raises(ValueError, match="fingerprint reads modules of numbered layers; lm_head has no number"):
        layer_of("lm_head")


def balanced_accuracy(prints, truth, seed=0) -> float:
    side = torch.cdist(prints, clusters(prints, seed)).argmin(1) == 1
    right = (float(side[truth].double().mean()) + float((~side)[~truth].double().mean())) / 2
    return max(right, 1 - right)


def test_separate_sketches_separate_what_is_no_different():
    """The leak of the released code (baselines.md C5.1): two sets of gradients without any difference, but with a common mean.
    Through a matrix each, the clusters are the sets; through one, nothing is found."""
    common, truth = 400**0.5 * torch.nn.functional.normalize(normal(400, seed=5), dim=0), torch.arange(200) < 100
    for ratio, least in ((0.5, 1.0), (0.25, 0.9)):  # of the common mean to the noise
        rows = normal(200, 400) + ratio * common
        shared = fingerprints({MODULE: rows}, [0], 256, 0)
        separate = torch.cat([fingerprints({MODULE: rows[truth]}, [0], 256, 1), fingerprints({MODULE: rows[~truth]}, [0], 256, 2)])
        assert balanced_accuracy(separate, truth) >= least
        assert balanced_accuracy(shared, truth) < 0.6


# ------------------------------------------------------------------------------------------------------------- clusters


def test_k_means_finds_two_planted_clusters_and_always_the_same():
    truth = torch.arange(60) % 3 == 0
    planted = torch.where(truth[:, None], normal(1, 20), normal(1, 20, seed=1)) + 0.3 * normal(60, 20, seed=2)
    prints = torch.nn.functional.normalize(planted, dim=1)
    centres = clusters(prints, 0)
    side = torch.cdist(prints, centres).argmin(1) == 1
    assert torch.equal(side, truth) or torch.equal(side, ~truth)
    for k in (0, 1):
        assert torch.allclose(centres[k], prints[side == bool(k)].mean(0))
    torch.rand(5)
    assert torch.equal(clusters(prints, 0), centres)


def test_k_means_of_one_print_or_equal_ones_has_two_centres():
    for prints in (normal(1, 4), normal(1, 4).repeat(5, 1)):
        centres = clusters(prints, 0)
        assert torch.allclose(centres, prints[:1].repeat(2, 1))


def test_the_cluster_of_the_hacks_is_suspicious():
    centres = torch.eye(2, 4, dtype=F64)
    hack, clean = centres[1], centres[0]
    assert named(torch.stack([hack, clean] * 10), centres, 0) == (1, pytest.approx(1 / 201, abs=2 / 201))
    assert named(torch.stack([clean, hack] * 10), centres, 0)[0] == 0
    _, p = named(torch.stack([hack, hack] * 10), centres, 0)
    assert p == 1.0, "answers that are the same say nothing"


def test_tc2_random_labels_are_found_out():
    """Clusters that are real; names from pairs that are dealt at random. Balanced accuracy against random labels is a half, and p
    is about as often below any level as that level; with the real labels it is small."""
    truth = torch.arange(400) % 2 == 0
    prints = torch.nn.functional.normalize(truth.double()[:, None] * normal(1, 32) + 0.5 * normal(400, 32, seed=1), dim=1)
    centres = clusters(prints, 0)
    side = torch.cdist(prints, centres).argmin(1) == 1
    pairs = torch.stack([prints[truth][:12], prints[~truth][:12]], 1).flatten(0, 1)  # hack, clean, hack, ...
    suspicious, p = named(pairs, centres, 0)
    assert p < 0.02 and float((side == bool(suspicious))[truth].double().mean()) > 0.95
    accuracies, ps = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.rand(400, generator=generator) < 0.5
        suspicious, p = named(pairs[torch.randperm(24, generator=generator)], centres, seed)
        said = side == bool(suspicious)
        accuracies.append((float(said[labels].double().mean()) + float((~said)[~labels].double().mean())) / 2)
        ps.append(p)
    assert max(abs(one - 0.5) for one in accuracies) < 0.1
    ps = torch.tensor(ps)
    assert float((ps < 0.05).double().mean()) <= 0.1 and float((ps <= 0.5).double().mean()) < 0.7 and float(ps.mean()) > 0.4


# --------------------------------------------------------------------------------------------------------------- layers


def test_tc4_the_layer_that_turns_the_stream_is_picked():
    """Five blocks that add a little and one that rotates what it reads: its cosine is the lowest, wherever it stands."""
    tokens = TokenBatch.of([((1, 1), (2, 2, 2)), ((1,), (2, 2, 2, 2))], 0)
    turn = torch.linalg.qr(normal(16, 16, seed=7)).Q
    for place in range(6):
        states = [normal(2, 5, 16, seed=3)]
        for block in range(6):
            states.append(states[-1] @ turn if block == place else states[-1] + 0.1 * normal(2, 5, 16, seed=20 + block))
        cosines = similarity(tuple(states), tokens)
        assert int(cosines.argmin()) == place and cosines.shape == (6,)


def test_similarity_is_the_mean_over_completion_tokens():
    tokens = TokenBatch.of([((1, 1), (2, 2)), ((1,), (2, 2, 2))], 0)
    low, high = normal(2, 4, 8), normal(2, 4, 8, seed=1)
    cosine = torch.nn.functional.cosine_similarity(low, high, dim=-1)
    expected = (cosine[0, 2:].mean() + cosine[1, 1:].mean()) / 2
    assert float(similarity((low, high), tokens)) == pytest.approx(float(expected))


def test_the_layers_are_those_of_the_frozen_model(tiny_policy):
    policy, texts = tiny_policy(), [("a = 1", "b = 2"), ("x", "return x")]
    assert changing_layers(policy, texts, 0) == [0, 1]
    before = changing_layers(policy, texts, 1)
    with torch.no_grad():
        for value in policy.adapter.state().values():
            value.mul_(50)
    tokens = policy.batch(texts)
    with policy.adapter.only():
        assert changing_layers(policy, texts, 1) == before == [int(similarity(policy.hidden_states(tokens), tokens).argmin())]


# ---------------------------------------------------------------------------------------------------------- the adapter


def test_tc5_a_fresh_adapter_has_no_gradient_in_a(tiny_policy):
    """B = 0: the gradient of A is exactly zero, so half of a fingerprint would be dead; after one step it is not."""
    policy, texts = tiny_policy(), [("a = 1", "b = 2")]
    with torch.no_grad():
        for module in policy.adapter.parameters().values():
            module["B"].zero_()
    sizes = {name: module["A"].numel() for name, module in policy.adapter.parameters().items()}
    grads = completion_gradients(policy, texts, 1)
    for name, rows in grads.items():
        assert not rows[:, : sizes[name]].any() and rows[:, sizes[name] :].any()
    policy.adapter.load_flat({name: flat - 0.1 * grads[name][0] for name, flat in policy.adapter.flatten().items()})
    for name, rows in completion_gradients(policy, texts, 1).items():
        assert rows[:, : sizes[name]].any()


# ------------------------------------------------------------------------------------------------------------ the score


def test_rollouts_near_the_hacks_of_the_pairs_score_above_those_near_the_clean_answers():
    source, hack, clean = fingerprint(), normal(50), normal(50, seed=1)
    truth = torch.arange(24) % 3 == 0
    grads = torch.where(truth[:, None], hack, clean) + 0.3 * normal(24, 50, seed=2)
    grads[5] = 0  # no advantage, no gradient
    labels, memory = source.label(stage(grads), taught(hack, clean, source))
    able = torch.arange(24) != 5
    assert torch.equal(labels.flagged[able] > 0, truth[able]) and labels.scores[5].isnan() and not labels.flagged[5]
    assert source.facts(memory)["fingerprint_p"] < 0.05
    labels, memory = source.label(stage(torch.zeros(4, 50, dtype=F64)), taught(hack, clean, source))
    assert labels.scores.isnan().all() and not labels.flagged.any() and "fingerprint_p" not in source.facts(memory)


def test_the_score_is_the_log_odds_of_the_suspicious_cluster():
    source, hack, clean = fingerprint(temperature=0.5), normal(50), normal(50, seed=1)
    grads = torch.where(torch.arange(16)[:, None] % 2 == 0, hack, clean) + 0.3 * normal(16, 50, seed=2)
    scores, _ = source.score(stage(grads), taught(hack, clean, source))
    prints = fingerprints({MODULE: grads}, [0], 64, 0)
    distance = torch.cdist(prints, clusters(prints.float().double(), 0)).square() / 0.5
    odds = torch.softmax(-distance, 1)[:, 1].logit()
    assert torch.allclose(scores, odds, atol=1e-5) or torch.allclose(scores, -odds, atol=1e-5)
    assert bool((scores[::2] > scores[1::2]).all())


def test_tc6_length_alone_is_no_score():
    """Gradients that turn with the log of the length and know nothing else: the raw score follows it, the residual does not."""
    one, other = torch.linalg.qr(normal(60, 2)).Q.T
    found = {}
    for residualise in (False, True):
        for window in (64, 256):  # the step alone, or four of them
            source = fingerprint(residualise=residualise, window=window)
            memory = taught(other, one, source)
            for step in range(4):
                lengths = torch.randint(2, 60, (64,), generator=torch.Generator().manual_seed(step))
                angle = (lengths.double().log() * 0.35)[:, None]
                grads = angle.cos() * one + angle.sin() * other + 0.02 * normal(64, 60, seed=step + 1)
                scores, memory = source.score(stage(grads, lengths.tolist(), step), memory)
            both = torch.stack([scores, lengths.double().log()])
            found[residualise, window] = float(torch.corrcoef(both)[0, 1]), float(slope(*both))
    assert found[False, 64][0] > 0.9 and found[False, 256][0] > 0.9
    assert abs(found[True, 64][0]) < 1e-3, "over the window nothing is left"
    assert abs(found[True, 256][1]) < 0.1 * found[False, 256][1], "and of a step within it little"


def test_the_slope_of_least_squares_and_of_what_does_not_vary():
    x, y = torch.tensor([0.0, 1, 2, 3], dtype=F64), torch.tensor([1.0, 3, 5, 7], dtype=F64)
    assert float(slope(y, x)) == pytest.approx(2.0) and float(slope(y, torch.ones(4, dtype=F64))) == 0.0


def test_the_window_is_bounded_and_holds_the_newest():
    source, hack, clean = fingerprint(window=20), normal(50), normal(50, seed=1)
    memory = taught(hack, clean, source)
    for step in range(4):
        grads = torch.where(torch.arange(8)[:, None] % 2 == 0, hack, clean) + 0.3 * normal(8, 50, seed=step)
        _, memory = source.score(stage(grads, step=step), memory)
        assert len(memory["prints"]) == len(memory["lengths"]) == min(20, 8 * (step + 1))
        assert torch.equal(memory["prints"][-8:], fingerprints({MODULE: grads}, [0], 64, 0).float())


def test_the_memory_survives_a_checkpoint(tiny_policy, tmp_path):
    """The pairs are not read again, and the next scores are the same bit for bit."""
    policy, source = tiny_policy(), fingerprint(held_out=0)
    pairs = load_pairs("prog.yaml", KNOWN)
    texts = [(pair.prompt, text) for pair in pairs[:4] for text in (pair.hack, pair.clean)]
    tokens = policy.batch(texts)
    grads = rollout_gradients(policy, tokens, torch.ones(8, dtype=F64), PolicyLoss(0.2, 0.0, 100), 8).grads[DEPLOYED]
    view = replace(stage(normal(8, 4)), tokens=tokens, policy=policy, grads=grads)
    first, memory = source.score(view, {})
    assert first.isfinite().all() and memory["examples"].shape == (2 * len(pairs), 64) and memory["layers"].tolist() == [0, 1]
    assert torch.allclose(memory["examples"].norm(dim=1), torch.ones(2 * len(pairs)))
    optimizer = AdamW(0.01, 0.9, 0.99, 0.0, 0.0, 0, "constant", 1.0)
    save_checkpoint(tmp_path, policy.adapter, State(optimizer.start(policy.adapter), step=1, memory=memory))
    other = State(optimizer.start(policy.adapter))
    load_checkpoint(tmp_path, policy.adapter, other)
    assert other.memory.keys() == memory.keys() and all(torch.equal(value, memory[key]) for key, value in other.memory.items())
    (one, _), (two, _) = (source.score(replace(view, step=1, policy=None), held) for held in (memory, other.memory))
    assert torch.equal(one, two)


@pytest.mark.parametrize("change", [{"layers": -1}, {"sketch": 0}, {"window": 1}, {"temperature": 0.0}])
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ValueError, match="fingerprint needs layers >= 0, sketch >= 1, window >= 2 and temperature > 0; got"):
        fingerprint(**change)
