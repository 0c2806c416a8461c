"""Peak memory of the update over batch x micro-batch, counted two ways: live tensors (exact) and torch's profiler (with what kernels
allocate inside themselves). Rows that should be alike: one micro-batch, any batch. Two blocks, a routed and a natural sum.

    python -m benchmarks.memory
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gradient import planned
from grpo_routing import build
from grpo_routing.gradient import rollout_gradients
from grpo_routing.memory import LiveBytes
from grpo_routing.types import Asked, TokenBatch

BATCHES, MICRO_BATCHES, PROMPT, COMPLETION = (16, 64, 256), (4, 16, 64), 64, 48


def work(plan: build.Plan, policy: build.Policy, batch: int, micro_batch: int, keep: bool):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, policy.model.config.vocab_size, (batch, PROMPT + COMPLETION), generator=draw).tolist()
    tokens = TokenBatch.of([(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in ids], policy.pad)
    ones = torch.ones(batch)
    asked = None if keep else {block: Asked([ones, ones / 2]) for block in policy.adapter.blocks}
    return lambda: rollout_gradients(policy, tokens, ones, plan.trainer.loss(), micro_batch, None, policy.adapter.blocks, asked=asked)


def live(run) -> int:
    with LiveBytes() as seen:
        run()
    return seen.peak


def profiled(run) -> int:
    """Highest sum of the profiler's allocations and releases."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    total = peak = 0
    for event in sorted((e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def main() -> None:
    torch.set_num_threads(1)
    plan = planned("arm=half_ablation", "model.phases=[]")
    policy = build.build_policy(plan)
    print(f"MB of live tensors / of the profiler; adapter {sum(map(policy.adapter.size, policy.adapter.blocks)):,} numbers")
    for keep in (False, True):
        print("every rollout's gradient kept, for decisions that read it" if keep else "sums, decided before the backward")
        print("| batch | " + " | ".join(f"micro_batch {micro}" for micro in MICRO_BATCHES) + " |\n|---|" + "---|" * len(MICRO_BATCHES))
        for batch in BATCHES:
            cells = [f"{live(run) / 1e6:.1f} / {profiled(run) / 1e6:.1f}" if micro <= batch else "–" for micro in MICRO_BATCHES
                     for run in [work(plan, policy, batch, micro, keep)]]
            print(f"| {batch} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
