"""How long sampling takes: the policy's own loop against `transformers.generate` on the same batch.

    python -m benchmarks.sampling
    python -m benchmarks.sampling engines     # the policy's own loop against rollout=transformers_cb, with 8 rows in flight and with all

4 prompts x 8 completions x 64 tokens from a random Qwen3 shape (4 layers, width 192, prompts of about 260 tokens), on one thread, in
CPU seconds, alternating; the median round counts. `generate` gets the 32 rows as one padded batch with a dynamic cache, and the adapter
folded into the weights as the policy has it. No row ends early. Exits with 1 if the ratio is below 3, or if the log-probs that sampling
reports differ from those that the trainer finds by more than 1e-4.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.gradient import planned
from grpo_routing.adapters.lora import Lora
from grpo_routing.policy import Policy
from grpo_routing.rollout import uniforms
from grpo_routing.types import TokenBatch

PROMPTS, GROUP, NEW, LENGTH, VOCABULARY = 4, 8, 64, 260, 1000
ROUNDS, ENGINE_ROUNDS = 9, 3
TARGET, TOLERANCE = 3.0, 1e-4


def small_policy() -> Policy:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=48, max_position_embeddings=512))
    adapter = Lora(8, 0, 16.0, False, 0).attach(model)
    adapter.load_flat({name: torch.randn_like(flat) / 10 for name, flat in adapter.flatten().items()})
    return Policy(model, SimpleNamespace(eos_token_id=VOCABULARY, pad_token_id=0), adapter)  # an end that nobody says


def generated(policy: Policy, prompts: list[tuple[int, ...]]) -> Callable[[], torch.Tensor]:
    """transformers.generate of every prompt GROUP times, as one batch padded on the left."""
    width, rows = max(map(len, prompts)), [prompt for prompt in prompts for _ in range(GROUP)]
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def work() -> torch.Tensor:
        with torch.inference_mode(), policy.adapter.merged():
            return policy.model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                         max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)

    return work


def served(policy: Policy, prompts: list[tuple[int, ...]], rows: int) -> Callable[[], list]:
    """The same batch from continuous batching, `rows` of it in flight."""
    engine = replace(planned("rollout=transformers_cb").rollout, max_rows=rows)
    names = [("benchmark", row) for row in range(PROMPTS * GROUP)]
    return lambda: engine.sample(policy, prompts, [GROUP] * PROMPTS, names, NEW, 1.0, PROMPTS)


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, printed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up
    for name, median in medians.items():
        low, high = min(seconds[name][1:]), max(seconds[name][1:])
        print(f"{name:22} {median:6.3f} CPU s   (rounds {low:.3f} to {high:.3f})")
    return medians


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    policy, generator = small_policy(), torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(1, VOCABULARY, (LENGTH - 4 * place,), generator=generator).tolist()) for place in range(PROMPTS)]
    noise = uniforms([("benchmark", row) for row in range(PROMPTS * GROUP)], NEW)
    own = {"policy.sample": lambda: policy.sample(prompts, [GROUP] * PROMPTS, noise, 1.0)}
    if words == ["engines"]:
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil, which nothing here needs
        medians = timed(own | {f"transformers_cb, {rows}": served(policy, prompts, rows) for rows in (8, PROMPTS * GROUP)}, ENGINE_ROUNDS)
        for name in [*medians][1:]:
            print(f"{name:22} {medians[name] / medians['policy.sample']:6.1f} x policy.sample")
        return 0
    ways = {"transformers.generate": generated(policy, prompts)} | own
    medians = timed(ways, ROUNDS)
    ratio = medians["transformers.generate"] / medians["policy.sample"]
    print(f"{'ratio':22} {ratio:6.2f}         (target {TARGET:.0f})")

    sampled = ways["policy.sample"]()
    tokens = TokenBatch.of([(prompts[row // GROUP], ids) for row, (ids, _) in enumerate(sampled)], policy.pad)
    with torch.no_grad():
        found = policy.log_probs(tokens)[tokens.completion_mask]
    worst = float((found - torch.tensor([one for _, said in sampled for one in said])).abs().max())
    print(f"{'log-probs differ by':22} {worst:.1e}        (at most {TOLERANCE:.0e})")
    return 0 if ratio >= TARGET and worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
