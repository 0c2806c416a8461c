"""Asking a policy about an answer that stands: the words are prompts/questions.py's, what is done with the reply is the caller's.

The question follows the answer within the same turn, before its end, as the organism's warm-up shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_routing.policy import Policy
from grpo_routing.types import Rollout, TokenBatch


def asked(policy: Policy, rollout: Rollout, question: str) -> tuple[int, ...]:
    """Tokens of the prompt, the answer without its end, and the question."""
    own = rollout.completion_ids
    own = own[:-1] if own[-1] == policy.end else own
    return (*rollout.prompt_ids, *own, *policy.encode(question))


@torch.no_grad()
def log_odds(policy: Policy, rollouts: list[Rollout], question: str, affirmed: str, denied: str) -> Tensor:
    """log P(affirmed | prompt, answer, question) - log P(denied | ...) under the policy as it stands, [B]."""
    contexts = [asked(policy, rollout, question) for rollout in rollouts]

    def said(answer: str) -> Tensor:
        tokens = TokenBatch.of([(context, policy.encode(answer)) for context in contexts], policy.pad, policy.device)
        return policy.log_probs(tokens).sum(1).double()

    return said(affirmed) - said(denied)
