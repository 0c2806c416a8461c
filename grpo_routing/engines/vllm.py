"""vLLM in this process, on the same GPU: other kernels, and a copy of the weights.

    before every batch   the deployed weights, blocks folded in at their present scales, are loaded into the copy; its prefix cache is reset
    every rollout        a request of its own: SamplingParams(n=1, seed from its name, temperature, top_p=1, top_k=-1, logprobs=0)
    log-probs            of the model's own distribution, at temperature 1 (logprobs_mode=raw_logprobs)

NEVER RUN: vLLM could not be installed where this was written. The calls are those of its offline API (`LLM`, `SamplingParams`,
`LLM.generate`, `LLM.apply_model`, `LLM.reset_prefix_cache`; version 0.10 and later) as its sources have them. Tests put a stand-in in
place of its own classes, and check the weights that it would be given, the requests, and the reading of its outputs. For the first real
run the canary (canary.py) vouches.

The model that vLLM builds is empty (load_format=dummy) from the config of the one that is trained, so organisms and prepared models are
served like those of the hub. A rollout's seed is its own, but vLLM's kernels round by what shares the batch: runs are not reproducible
bit for bit. A block that is no change of the model's own weights cannot be served (build.py refuses: adapter=mlp, a gate).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from grpo_routing.engines.canary import Canary, Watched
from grpo_routing.policy import Policy, Sampled
from grpo_routing.rollout import named_seed

if TYPE_CHECKING:
    import vllm

HERE = "VLLM_ENABLE_V1_MULTIPROCESSING"  # 0: the engine lives in this process, so that tensors are handed over as they are


@dataclass(frozen=True)
class Vllm:
    memory: float
    max_length: int
    eager: bool
    canary: Canary
    served, copies, tempers = True, True, False

    def __post_init__(self) -> None:
        if not 0 < self.memory < 1:
            raise ValueError(f"rollout.memory must be a share of the GPU's memory between 0 and 1; got {self.memory}")
        if self.max_length < 2:
            raise ValueError(f"rollout.max_length must be at least 2 tokens; got {self.max_length}")

    def start(self, policy: Policy) -> Watched:
        """Raises RuntimeError without the package."""
        if find_spec("vllm") is None:
            raise RuntimeError("rollout=vllm needs the package vllm, which is not installed (pip install vllm, which brings the torch that "
                               "it wants); use rollout=transformers_cb, which needs nothing, or rollout=own")
        os.environ[HERE] = "0"
        from vllm import LLM, SamplingParams

        return self.canary.over(Server(LLM(**self.settings(policy)), SamplingParams, self.max_length), "vllm", policy)

    def settings(self, policy: Policy) -> dict[str, Any]:
        """What `vllm.LLM` is made with."""
        return {"model": empty_model(policy), "skip_tokenizer_init": True, "load_format": "dummy", "generation_config": "vllm",
                "dtype": str(policy.model.dtype).removeprefix("torch."), "gpu_memory_utilization": self.memory,
                "max_model_len": self.max_length, "enforce_eager": self.eager, "enable_prefix_caching": True,
                "logprobs_mode": "raw_logprobs", "tensor_parallel_size": 1}


def empty_model(policy: Policy) -> str:
    """A folder with the model's config alone; generation settings, such as a top-k of its own, are not among it."""
    folder, config = tempfile.mkdtemp(prefix="grpo_routing_vllm_"), policy.model.config
    config.architectures = [type(policy.model).__name__]
    config.save_pretrained(folder)
    return folder


class Server:
    """`llm` is a vllm.LLM, `words` the class vllm.SamplingParams."""

    def __init__(self, llm: vllm.LLM, words: Callable[..., Any], max_length: int) -> None:
        self.llm, self.words, self.max_length = llm, words, max_length

    def sample(self, policy: Policy, prompts: list[tuple[int, ...]], counts: list[int], names: list[tuple], max_new_tokens: int,
               temperature: float, at_once: int) -> list[Sampled]:
        """As `Engine.sample`. Raises ValueError for prompts that are too long, RuntimeError for outputs that are none."""
        if (longest := max(map(len, prompts)) + max_new_tokens) > self.max_length:
            raise ValueError(f"rollout.max_length is {self.max_length}, and a prompt with its completion has up to {longest} tokens")
        self.sync(policy)
        asked = [{"prompt_token_ids": list(prompt)} for prompt, count in zip(prompts, counts) for _ in range(count)]
        words = [self.words(n=1, seed=named_seed(*name) >> 1, temperature=temperature, top_p=1.0, top_k=-1, logprobs=0,
                            max_tokens=max_new_tokens, stop_token_ids=[policy.end], detokenize=False) for name in names]
        return [completion(output, policy.end) for output in self.llm.generate(asked, words, use_tqdm=False)]

    def sync(self, policy: Policy) -> None:
        """The policy's present weights into vLLM's copy; what it has cached is of the old ones. Raises RuntimeError for a part of it."""
        with policy.adapter.merged():
            (old,) = self.llm.apply_model(partial(load, weights=merged_weights(policy)))
        if old:
            raise RuntimeError(f"vLLM's model has {len(old)} parameters that the trained one did not give, such as {old[:3]}; it would "
                               "serve them as they were. It may know this architecture under other names; use rollout=transformers_cb")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache, which holds keys and values of old weights; is a request running?")


def load(model: nn.Module, weights: list[tuple[str, Tensor]]) -> list[str]:
    """In vLLM's worker: load the weights; returns the model's parameters that got none."""
    got = model.load_weights(weights)
    return sorted(name for name, _ in model.named_parameters() if name not in got)


def merged_weights(policy: Policy) -> list[tuple[str, Tensor]]:
    """The model's own tensors by their names, without the adapter's; call it while the blocks are merged. A tied head is the embedding."""
    tied = policy.model.config.tie_word_embeddings
    head = next(f"{name}.weight" for name, module in policy.model.named_modules() if module is policy.model.get_output_embeddings())
    return [(name, tensor) for name, tensor in policy.model.state_dict().items() if ".blocks." not in name and not (tied and name == head)]


def completion(output: Any, end: int) -> Sampled:
    """Token ids and their log-probs of a vllm.RequestOutput. Raises RuntimeError for one that was cut off or says nothing of a token."""
    said = output.outputs[0]
    ids = tuple(said.token_ids)
    if said.finish_reason not in ("stop", "length") or (said.finish_reason == "stop") != (ids[-1:] == (end,)):
        raise RuntimeError(f"expected a completion that ends with token {end} or at its length; vLLM gave finish_reason "
                           f"{said.finish_reason!r} after {len(ids)} tokens, the last {ids[-1:]}")
    if said.logprobs is None or len(said.logprobs) != len(ids):
        raise RuntimeError(f"expected a log-prob of each of {len(ids)} tokens; vLLM gave {said.logprobs and len(said.logprobs)}")
    return ids, tuple(float(row[token].logprob) for token, row in zip(ids, said.logprobs))
