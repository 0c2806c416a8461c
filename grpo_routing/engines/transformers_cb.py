"""transformers' continuous batching: a row that ends makes room for the next, and keys and values lie in pages.

In this process, on the model that is trained, its blocks folded into the weights while it samples; so there are no weights to hand over,
and every adapter and seat works. Each batch of rollouts has a manager of its own: one that is kept shares pages of prompts across
updates, and CUDA graphs of it would read the addresses of weights that are gone once the blocks are unfolded (both off here).

Not the policy's uniform numbers but one seed per batch of rollouts, torch's stream from it: a rollout depends on what it shares the batch
with. On a CPU the same batch is written again bit for bit (a test); on a GPU that was not shown. The attention is the model's
(`model.attn_implementation`): with sdpa every token meets the keys of all rows behind a mask, which is slow for many rows; flash
attention does not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from grpo_routing.engines.canary import Canary, Watched
from grpo_routing.policy import Policy, Sampled
from grpo_routing.rollout import named_seed

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager

WAIT = 1.0  # seconds between looks at whether the manager's thread is alive


@dataclass(frozen=True)
class TransformersCb:
    page_size: int
    max_batch_tokens: int
    max_rows: int
    canary: Canary
    served, copies, tempers = True, False, True

    def __post_init__(self) -> None:
        for name, least in (("page_size", 4), ("max_batch_tokens", 1), ("max_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"rollout.{name} must be at least {least}; got {getattr(self, name)}")

    def start(self, policy: Policy) -> Watched:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # what goes wrong is raised here
        return self.canary.over(self, "transformers_cb", policy)

    def sample(self, policy: Policy, prompts: list[tuple[int, ...]], counts: list[int], names: list[tuple], max_new_tokens: int,
               temperature: float, at_once: int) -> list[Sampled]:
        """As `Engine.sample`, at temperature 1. Raises RuntimeError with what transformers says when it fails."""
        asked = [list(prompt) for prompt, count in zip(prompts, counts) for _ in range(count)]
        with policy.adapter.merged(), torch.random.fork_rng([] if policy.device.type == "cpu" else [policy.device]):
            manager = self.manager(policy, asked, max_new_tokens, named_seed(*names[0]) >> 1)
            for row, prompt in enumerate(asked):  # before the loop starts, so that what shares a forward does not depend on threads
                manager.add_request(prompt, request_id=str(row))
            manager.start()
            try:
                return gathered(manager, len(asked))
            finally:
                manager.stop(hard_stop=True)
                manager.destroy()

    def manager(self, policy: Policy, asked: list[list[int]], max_new_tokens: int, seed: int) -> ContinuousBatchingManager:
        """With pages for `max_rows` of the longest rows."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        rows, longest = min(len(asked), self.max_rows), max(map(len, asked)) + max_new_tokens
        settings = ContinuousBatchingConfig(
            page_size=self.page_size, num_blocks=rows * -(-longest // self.page_size) + 1, max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=rows, return_logprobs=True, seed=seed, use_cuda_graph=False, use_async_batching=False,
            auto_switch_to_flash=False)
        words = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
                                 eos_token_id=policy.end, pad_token_id=policy.pad)
        return policy.model.init_continuous_batching(words, settings)


def gathered(manager: ContinuousBatchingManager, count: int) -> list[Sampled]:
    """The completions by row. Raises RuntimeError, or FloatingPointError where no token could be drawn."""
    found: dict[int, Sampled] = {}
    while len(found) < count:
        said = manager.get_result(timeout=WAIT)
        if said is None and not manager.is_running():
            why = manager.background_thread_status.fatal_error
            raise RuntimeError(f"continuous batching ended with {len(found)} of {count} rollouts: {why}. rollout=own needs none of it")
        if said is not None and said.error is not None:
            kind = FloatingPointError if "nan" in said.error else RuntimeError
            raise kind(f"continuous batching failed: {said.error}. rollout=own needs none of it")
        if said is not None:
            found[int(said.request_id)] = (tuple(said.generated_tokens), tuple(said.logprobs))
    return [found[row] for row in range(count)]
