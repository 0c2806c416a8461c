"""What a policy makes of pairs: the products from which any leave-one-out score follows (check.py).

    products[a, i, j] = unit(x of side a of pair i) . difference(j)            unit(x) = x / |x|; side 0 is hack, 1 is clean
    gradient      x = g, gradient of the mean completion NLL, all modules in one row; difference = unit(g(hack) - g(clean))
    activation    x = h, hidden states of the frozen model, mean over the completion;  difference = unit(h(hack)) - unit(h(clean))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.mask_sources.direction import completion_gradients
from grpo_routing.mask_sources.pairs import Pair
from grpo_routing.policy import Policy
from grpo_routing.types import TokenBatch

LAYERS = (0, 1)  # hidden states: 0 is the embedding
MICRO_BATCH = 16


def gradient_products(policy: Policy, pairs: list[Pair]) -> Tensor:
    with policy.adapter.only(DEPLOYED):
        hack, clean = of_both(pairs, lambda texts: torch.cat(list(completion_gradients(policy, texts, MICRO_BATCH).values()), 1))
    return unit(torch.stack([hack, clean])) @ unit(hack - clean).T


def activation_products(policy: Policy, pairs: list[Pair]) -> Tensor:
    rows = unit(of_both(pairs, lambda texts: policy.pooled_hidden(batch(policy, texts), LAYERS)))
    return rows @ (rows[0] - rows[1]).T


def token_counts(policy: Policy, pairs: list[Pair]) -> Tensor:
    """Tokens of each completion with its end token, [2, N]."""
    return of_both(pairs, lambda texts: batch(policy, texts).completion_mask.sum(1))


def of_both(pairs: list[Pair], read: Callable[[list[tuple[str, str]]], Tensor]) -> Tensor:
    """What `read` makes of the (prompt, completion) texts of either side, [2, N, …] in float64 on the CPU."""
    return torch.stack([read([(pair.prompt, text) for pair, text in zip(pairs, texts)]).double().cpu()
                        for texts in ([pair.hack for pair in pairs], [pair.clean for pair in pairs])])


def batch(policy: Policy, texts: list[tuple[str, str]]) -> TokenBatch:
    prompts, answers = policy.encode_prompts([prompt for prompt, _ in texts]), policy.encode_all([answer for _, answer in texts])
    return TokenBatch.of([(prompt, (*answer, policy.end)) for prompt, answer in zip(prompts, answers)], policy.pad, policy.device)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1. Raises ValueError for a row of zeros, which has no direction."""
    length = rows.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError("a gradient, a hidden state or a difference of two is all zeros; it has no direction")
    return rows / length
