"""Claims about the update: no table of positions x vocabulary, memory that the micro-batch sets and the batch does not, nothing computed
for rollouts without advantage, and the same numbers as the plain way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo_routing import head
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.gradient import Forward, PolicyLoss, alike, of_like_length, of_like_size, rollout_gradients
from grpo_routing.head import chosen_log_probs, chunk_rows
from grpo_routing.mask_sources.direction import alignment, direction, pair_differences
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.memory import LiveBytes
from grpo_routing.policy import Policy
from grpo_routing.types import Asked, Basis, Packed, TokenBatch
from tests.test_gradient import advantages_for, relative, some_tokens

F64, BLOCKS, LOSS = torch.float64, (DEPLOYED, QUARANTINE), PolicyLoss(0.2, 0.0, 100)
TWO = "adapter.quarantine_rank=4"


def positions(count, width, vocabulary, dtype=F64, bias=False, seed=0):
    """A frozen head, hidden states and targets."""
    torch.manual_seed(seed)
    linear = nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    return linear, torch.randn(count, width, dtype=dtype, requires_grad=True), torch.randint(vocabulary, (count,))


def plain(linear, hidden, targets):
    logits = linear(hidden)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_of_any_size_give_the_plain_value_and_gradient(monkeypatch, rows, bias):
    linear, hidden, targets = positions(7, 5, 11, bias=bias)
    monkeypatch.setattr(head, "CHUNK_BYTES", rows * 11 * 8)
    assert chunk_rows(11, 8) == rows
    slopes = torch.randn(7, dtype=F64)  # another one for each position, as advantages and ratios make them
    ours, expected = chosen_log_probs(linear, hidden, targets), plain(linear, hidden, targets)
    assert torch.allclose(ours, expected, rtol=1e-13, atol=1e-14)
    one, other = (torch.autograd.grad(value, hidden, slopes)[0] for value in (ours, expected))
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-14) and one.any()


def test_a_certain_token_keeps_its_small_gradient_in_half_precision():
    """1 - p is taken in single precision: in half precision it would be lost at p near 1."""
    linear, hidden, targets = positions(64, 32, 50, torch.bfloat16)
    with torch.no_grad():
        hidden.mul_(6.0)
    targets = linear(hidden).argmax(1)
    exact = hidden.detach().double().requires_grad_()
    wide = nn.Linear(32, 50, bias=False, dtype=F64).requires_grad_(False)
    wide.weight.copy_(linear.weight)
    errors = []
    for way in (chosen_log_probs, plain):
        gradient, = torch.autograd.grad(way(linear, hidden, targets).sum(), hidden)
        truth, = torch.autograd.grad(plain(wide, exact, targets).sum(), exact)
        errors.append(float((gradient.double() - truth).norm() / truth.norm()))
    assert errors[0] < 1.1 * errors[1] + 1e-3, errors


def test_no_table_of_positions_times_vocabulary_is_ever_alive(monkeypatch):
    """At the vocabulary of Qwen3, forward and backward."""
    vocabulary, count = 151_936, 300
    monkeypatch.setattr(head, "CHUNK_BYTES", 1 << 26)  # a quarter: 110 positions
    linear, hidden, targets = positions(count, 4, vocabulary, torch.float32)
    table = 4 * count * vocabulary
    with LiveBytes() as seen:
        chosen_log_probs(linear, hidden, targets).sum().backward()
    assert seen.largest <= head.CHUNK_BYTES < table / 2
    assert seen.peak <= 2 * head.CHUNK_BYTES + 10_000_000  # logits and their log-softmax, never a third
    assert seen.live == hidden.grad.nbytes  # and nothing waits for the backward but one row as wide as the hidden state a position


def test_the_update_itself_holds_no_such_table(tiny_policy, monkeypatch):
    """The same through the policy: the largest tensor of a gradient pass is far below micro-batch x tokens x vocabulary."""
    policy, tokens = tiny_policy(), even(6, 40)
    vocabulary = policy.model.config.vocab_size
    monkeypatch.setattr(head, "CHUNK_BYTES", 8 * 8 * vocabulary)  # eight positions
    with LiveBytes() as seen:
        rollout_gradients(policy, tokens, torch.ones(6, dtype=F64), LOSS, 6, asked={DEPLOYED: Asked([torch.ones(6, dtype=F64)])})
    assert seen.largest < 6 * 40 * vocabulary * 8 / 3


@pytest.mark.parametrize(("broken", "error", "said"), [
    (lambda: nn.Sequential(nn.Linear(5, 11)).requires_grad_(False), TypeError, "a linear without anything after it; got Sequential"),
    (lambda: nn.Linear(5, 11), ValueError, "the output head is frozen here, and its weight asks for a gradient"),
])
def test_other_heads_are_refused(broken, error, said):
    with pytest.raises(error, match=said):
        chosen_log_probs(broken(), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------ micro-batches


def even(rows, width, prompt=4, seed=0):
    """Random rows of one length."""
    draw = torch.Generator().manual_seed(seed)
    both = torch.randint(2, 200, (rows, width), generator=draw).tolist()
    return TokenBatch.of([(tuple(row[:prompt]), tuple(row[prompt:])) for row in both], 0)


def test_micro_batches_hold_rollouts_of_like_length_and_each_once():
    lengths = [9, 3, 8, 4, 7, 5, 6]
    tokens = TokenBatch.of([((2, 3), tuple(range(2, length))) for length in lengths], 0)
    assert tokens.lengths().tolist() == lengths
    assert of_like_length(tokens, [0, 1, 2, 3, 4, 5, 6], 2) == [[0, 2], [4, 6], [3, 5], [1]]
    assert of_like_length(tokens, [6, 1, 0], 2) == [[0, 6], [1]]
    assert of_like_length(tokens, [1, 3, 6], 8) == [[1, 3, 6]]  # one micro-batch is the batch, in its order
    assert of_like_length(tokens, [], 2) == []


def test_the_model_sees_no_more_padding_than_sorting_leaves(tiny_policy):
    policy, seen = tiny_policy(), []
    handle = policy.model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, words: seen.append(tuple(words["input_ids"].shape)), with_kwargs=True)
    tokens = TokenBatch.of([((2, 3), tuple(range(2, length))) for length in (20, 4, 19, 5)], 0)
    rollout_gradients(policy, tokens, torch.ones(4, dtype=F64), LOSS, 2)
    handle.remove()
    assert seen == [(2, 20), (2, 5)]


def test_rollouts_without_advantage_are_not_run(tiny_policy):
    policy, seen = tiny_policy(), []
    handle = policy.model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, words: seen.append(len(words["input_ids"])), with_kwargs=True)
    advantages = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0, 0.0], dtype=F64)
    for kl_weight, expected in ((0.0, [2]), (0.1, [6, 6])):  # a penalty reaches every rollout, and asks the reference too
        seen.clear()
        rollout_gradients(policy, some_tokens(policy), advantages, PolicyLoss(0.2, kl_weight, 100), 6)
        assert seen == expected
    handle.remove()


# ------------------------------------------------------------------------------------------------------ sums instead of rows


def some_basis(rows, seed=3):
    torch.manual_seed(seed)
    return Basis({name: torch.linalg.qr(torch.randn(own.shape[1], 2, dtype=F64)).Q.T for name, own in list(rows.modules.items())[:5]})


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
def test_what_is_asked_before_the_backward_equals_what_kept_rows_say(tiny_policy, micro_batch):
    policy = tiny_policy("lora", TWO)
    tokens, advantages = some_tokens(policy), advantages_for()
    kept = rollout_gradients(policy, tokens, advantages, LOSS, 6, None, BLOCKS)
    basis = some_basis(kept.grads[DEPLOYED])
    weights = [torch.ones(6, dtype=F64), torch.tensor([1, 0, 1, 0.5, 0, 2], dtype=F64), torch.zeros(6, dtype=F64)]
    asked = {DEPLOYED: Asked(weights, direction(basis)), QUARANTINE: Asked(weights[1:])}
    sums = rollout_gradients(policy, tokens, advantages, LOSS, micro_batch, None, BLOCKS, asked=asked)
    for block in BLOCKS:
        for one in asked[block].sums:
            for name, expected in kept.grads[block].summed(one).items():
                assert torch.allclose(sums.grads[block].summed(one)[name], expected, rtol=1e-10, atol=1e-14), (block, name)
    assert sums.grads[DEPLOYED].summed() is sums.grads[DEPLOYED].summed(weights[0] == 1)
    assert torch.allclose(alignment(sums.grads[DEPLOYED], basis), alignment(kept.grads[DEPLOYED], basis), rtol=1e-10, equal_nan=True)
    assert bool(alignment(sums.grads[DEPLOYED], basis).isnan()[2]) and advantages[2] == 0  # without a gradient there is no score
    assert sums.loss == pytest.approx(kept.loss, rel=1e-12) and sums.ratio == kept.ratio
    assert torch.allclose(sums.old_log_probs, kept.old_log_probs, rtol=1e-12)


def test_rows_of_advantage_one_answer_for_any_advantages(tiny_policy):
    """The late decision: what is asked of A_i g_i from the kept g_i, signs and lengths included."""
    policy = tiny_policy("lora")
    tokens, advantages = some_tokens(policy), advantages_for()
    unit = rollout_gradients(policy, tokens, torch.ones(6, dtype=F64), LOSS, 6)
    basis = some_basis(unit.grads[DEPLOYED])
    asked = {DEPLOYED: Asked([torch.ones(6, dtype=F64), torch.tensor([1, 0, 1, 1, 1, 0.25], dtype=F64)], direction(basis))}
    late, early = unit.scaled(advantages, asked), rollout_gradients(policy, tokens, advantages, LOSS, 6, asked=asked)
    for one in asked[DEPLOYED].sums:
        expected = early.grads[DEPLOYED].summed(one)
        assert all(relative(flat, expected[name]) < 1e-6 for name, flat in late.grads[DEPLOYED].summed(one).items())
    assert torch.allclose(*(alignment(one.grads[DEPLOYED], basis) for one in (late, early)), rtol=1e-6, equal_nan=True)
    assert torch.allclose(late.grads[DEPLOYED].norms(), early.grads[DEPLOYED].norms(), rtol=1e-6)


def test_what_was_not_asked_is_refused(tiny_policy):
    policy = tiny_policy("lora")
    basis = some_basis(rollout_gradients(policy, some_tokens(policy), advantages_for(), LOSS, 6).grads[DEPLOYED])
    asked = {DEPLOYED: Asked([torch.ones(6, dtype=F64)])}
    sums = rollout_gradients(policy, some_tokens(policy), advantages_for(), LOSS, 6, asked=asked).grads[DEPLOYED]
    with pytest.raises(ValueError, match="summed with 1 sets of weights and not kept; these weights are not among them"):
        sums.summed(torch.tensor([1, 0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="inner products with these axes were not asked for"):
        alignment(sums, basis)
    with pytest.raises(ValueError, match="lengths of the rollouts' gradients were not asked for"):
        sums.norms()


# ------------------------------------------------------------------------------------------------------ prompts shared by rollouts


def grouped_tokens(lengths=((5, 2, 7, 3), (4, 4, 6), (3,)), prompts=(6, 9, 4)):
    """Three prompts with their completions, dealt so that a group's rows are not neighbours."""
    draw = torch.Generator().manual_seed(5)

    def ids(count):
        return tuple(torch.randint(2, 200, (count,), generator=draw).tolist())

    rows = []
    for own, prompt in zip(lengths, (ids(count) for count in prompts)):
        rows += [(prompt, ids(count)) for count in own]
    return TokenBatch.of([rows[place] for place in (0, 4, 1, 7, 5, 2, 6, 3)], 0)


@pytest.fixture
def shapes(monkeypatch):
    """What the decoder is given: the shapes of its inputs, in order."""
    seen, plain = [], Policy._hidden
    monkeypatch.setattr(Policy, "_hidden", lambda self, **inputs: seen.append(tuple(inputs["input_ids"].shape)) or plain(self, **inputs))
    return seen


@pytest.mark.parametrize("adapter", [("lora", TWO), ("svd",), ("mlp", "adapter.quarantine_width=4")])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_rollouts_of_a_prompt_share_it_and_sum_to_the_gradient_of_rows_of_their_own(tiny_policy, monkeypatch, shapes, adapter, kl_weight):
    policy, tokens = tiny_policy(*adapter), grouped_tokens()
    advantages = torch.tensor([1.0, -0.5, 0.7, 2.0, 0.3, 0.0, -1.5, -0.2], dtype=F64)
    loss = PolicyLoss(0.2, kl_weight, 100)
    asked = {block: Asked([torch.ones(8, dtype=F64), torch.tensor([1, 0, 1, 1, 0, 1, 0, 0.5], dtype=F64)]) for block in BLOCKS}
    forward = Forward(torch.tensor([1, 0.5, 1, 1, 0.5, 1, 0.5, 1], dtype=F64))

    def result(old=None):
        return rollout_gradients(policy, tokens, advantages, loss, 8, old, BLOCKS, forward, asked)

    ours, given = result(), sum(rows * width for rows, width in shapes)
    again = result(ours.old_log_probs - 0.01)  # a later inner step: the ratio is not 1
    monkeypatch.setattr(policy, "packs", False)
    shapes.clear()
    plain, expected_again = result(), result(ours.old_log_probs - 0.01)
    assert given < 0.8 * sum(rows * width for rows, width in shapes[: len(shapes) // 2])
    for one, other in ((ours, plain), (again, expected_again)):
        for block in BLOCKS:
            for weights in asked[block].sums:
                sums, expected = one.grads[block].summed(weights), other.grads[block].summed(weights)
                assert all(relative(sums[name], expected[name]) < 1e-6 for name in expected)  # transformers' norms are in single precision
        assert torch.allclose(one.losses, other.losses, rtol=1e-6, atol=1e-12)
        assert torch.allclose(one.old_log_probs, other.old_log_probs, rtol=1e-6)
        assert one.ratio == pytest.approx(other.ratio, rel=1e-6) and one.kl == pytest.approx(other.kl, rel=1e-5, nan_ok=True)


def test_only_what_is_treated_alike_shares_a_row():
    tokens, ones = grouped_tokens(), torch.ones(8)
    first, second = [0, 2, 5, 7], [1, 4, 6]  # rows of the first and the second prompt; row 3 is alone

    def groups(*sums, quarantine=None, passes=None, rows=range(8), **axes):
        return alike(tokens, list(rows), Forward(quarantine, passes), {DEPLOYED: Asked([ones, *sums], **axes)})

    assert groups() == [first, second]
    assert groups(rows=[0, 1, 3, 5, 6]) == [[0, 5], [1, 6]] and groups(rows=[0, 1, 3]) == []
    flags = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])
    expected = [[0, 2], second, [5, 7]]
    assert groups(flags) == groups(quarantine=flags) == groups(passes={QUARANTINE: flags}) == expected
    assert groups(axes={}) == [], "every rollout's own gradient is asked for"
    assert groups(axes={}, of=flags.bool()) == [second, [5, 7]]


def test_micro_batches_of_groups_keep_to_the_number_of_rollouts():
    groups = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert of_like_size(groups, 100) == [[[5, 6, 7, 8, 9], [0, 1, 2], [3, 4], [10, 11]]]
    assert of_like_size(groups, 4) == [[[5, 6, 7, 8]], [[0, 1, 2]], [[3, 4], [10, 11]], [[9]]]
    assert of_like_size([], 4) == []


def test_a_completion_sees_its_prompt_and_itself():
    packed = Packed.of([((1, 2), [(3, 4), (5,), (6, 7)]), ((1,), [(2,)])], 0)
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 0, 0, 0, 0, 0]]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 2, 2, 3] and packed.previous[0].tolist() == [0, 0, 1, 2, 1, 1, 5]
    seen = (packed.attention(F64)[:, 0] == 0).tolist()
    assert [[key for key in range(7) if row[key]] for row in seen[0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 5], [0, 1, 5, 6]]
    assert all(any(row) for row in seen[1]), "a row that sees nothing would be nan"


def test_only_the_rollouts_that_the_audit_will_judge_have_gradients_of_their_own(tiny_policy):
    policy, tokens, ones = tiny_policy(), grouped_tokens(), torch.ones(8, dtype=F64)
    kept = rollout_gradients(policy, tokens, ones, LOSS, 8)
    basis, judged = some_basis(kept.grads[DEPLOYED]), torch.arange(8) % 4 == 1
    sums = rollout_gradients(policy, tokens, ones, LOSS, 8, asked={DEPLOYED: Asked([ones], direction(basis), judged)})
    ours, expected = (alignment(one.grads[DEPLOYED], basis) for one in (sums, kept))
    assert torch.allclose(ours[judged], expected[judged], rtol=1e-6) and bool(ours[~judged].isnan().all())
    whole, plain = sums.grads[DEPLOYED].summed(), kept.grads[DEPLOYED].summed()
    assert all(relative(whole[name], plain[name]) < 1e-6 for name in plain)


@pytest.mark.parametrize(("change", "packs"), [
    ({}, True), ({"_attn_implementation": "flash_attention_2"}, False), ({"layer_types": ["full_attention", "sliding_attention"]}, False),
    ({"layer_types": ["linear_attention", "full_attention"]}, False), ({"layer_types": None}, True),
    ({"layer_types": None, "model_type": "mamba"}, False)])
def test_completions_share_a_row_only_where_attention_can_hide_them(tiny_policy, monkeypatch, change, packs):
    policy = tiny_policy()
    for name, value in change.items():
        monkeypatch.setattr(policy.model.config, name, value, raising=False)
    assert policy.packs is packs


def test_pairs_are_compared_the_same_way_where_they_cannot_share_a_row(tiny_policy, monkeypatch):
    policy, authored = tiny_policy(), load_pairs("prog.yaml", ("run_tests",))
    packed = pair_differences(policy, authored, "hack", "clean", 64)
    monkeypatch.setattr(policy, "packs", False)
    apart = pair_differences(policy, authored, "hack", "clean", 64)
    assert all(relative(packed[name], apart[name]) < 1e-6 for name in apart)


# ------------------------------------------------------------------------------------------------------ memory


def peak(policy, batch, micro_batch, keep=False):
    """Bytes that a gradient pass adds at its height to what was there before, two blocks, three sums."""
    ones = torch.ones(batch, dtype=F64)
    advantages = torch.linspace(-1, 1, batch, dtype=F64) + 2
    tokens = even(batch, 24)
    asked = None if keep else {block: Asked([ones, ones / 2]) for block in BLOCKS}
    with LiveBytes() as seen:
        result = rollout_gradients(policy, tokens, advantages, LOSS, micro_batch, None, BLOCKS, asked=asked)
    assert result.losses.all()
    return seen.peak


def test_memory_grows_with_the_micro_batch_and_not_with_the_batch(tiny_policy):
    """Exact counts of live tensors. Of the batch only tables of [B, T] numbers are there; rows that are kept are [B, D] a block."""
    policy = tiny_policy("lora", TWO)
    size = sum(policy.adapter.size(block) for block in BLOCKS)
    found = {(batch, micro): peak(policy, batch, micro) for batch in (8, 24) for micro in (2, 4, 8)}
    for micro in (2, 4, 8):
        assert abs(found[24, micro] - found[8, micro]) < 16 * 24 * 8 * 4 < 16 * size * 8 / 20, found  # T = 24
    for batch in (8, 24):
        slopes = [(found[batch, high] - found[batch, low]) / (high - low) for low, high in ((2, 4), (4, 8))]
        assert max(slopes) / min(slopes) < 1.02, slopes
        assert found[batch, 2] < 2.5 * slopes[0] + 3 * 8 * size, found  # and nearly through the origin: besides, there are the sums
    kept = {batch: peak(policy, batch, 8, keep=True) for batch in (8, 24)}
    assert abs((kept[24] - kept[8]) - 16 * size * 8) < 16 * 24 * 8 * 4  # what a decision after the backward costs, and no copy of it
