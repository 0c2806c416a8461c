"""What batching buys, in one process: ratios, medians over interleaved rounds. Pairs in wall time, because a batch can use all cores;
the rest in CPU seconds of this process, which other work on the machine changes less.

    pairs      gradients of all pair completions, batched and with the prompt shared, against one backward per completion (>= 5 x),
               as at every refit: the batched way finds the pairs tokenized
    rollouts   one backward with a gradient per rollout, against the plain summed backward (about 1 x)
    step       a GRPO step that erases along a fitted basis, against one that only measures (about 1 x)
    route      a step that routes whole rollouts by the cosine of their own gradient, against plain Dr.GRPO on the same two
               blocks (<= 1.25 x); with split moments too (<= 1.25 x), with a refit of the direction at every step; and with
               flags from a detector
    v_hack     one pair on a model of four layers of 192, where grpo_proj2 takes 0.25 to 0.5 s (shared/design/perf.md): <= 0.05 s

Uses the organism from the cache (trains it when it is not there). The pairs are measured on one thread and on all cores,
because a batch can use them and single completions cannot; the rest on one thread, as `trainer=laptop` runs.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, replace

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grpo_routing import build
from grpo_routing.__main__ import CONF
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.gradient import PolicyLoss, rollout_gradients
from grpo_routing.mask_sources.direction import pair_differences
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.train import State, train_step
from grpo_routing.types import TokenBatch

ROUNDS = 15


def planned(*overrides: str) -> build.Plan:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build.plan(OmegaConf.to_container(compose("config", ["loophole=held_out", *overrides]), resolve=True))


def compare(title: str, slow: tuple[str, callable], fast: tuple[str, callable], clock: callable = time.process_time) -> float:
    """Interleave both, print medians and the ratio slow / fast."""
    times: dict[str, list[float]] = {slow[0]: [], fast[0]: []}
    for _ in range(ROUNDS):
        for name, work in (slow, fast):
            started = clock()
            work()
            times[name].append(clock() - started)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
    ratio = medians[slow[0]] / medians[fast[0]]
    shown = "   ".join(f"{name} {1000 * value:8.1f} ms" for name, value in medians.items())
    print(f"{title:<10} {shown}   ratio {ratio:.2f}", flush=True)
    return ratio


def pairs() -> float:
    policy = build.build_policy(planned())
    authored = load_pairs("prog.yaml", ("run_tests", "sentinel", "stdout_marker"))
    parameters = policy.adapter.parameters()

    def gradient(prompt: str, completion: str) -> dict[str, torch.Tensor]:
        start = len(policy.tokenizer(prompt).input_ids)
        ids = torch.tensor([policy.tokenizer(prompt).input_ids + policy.tokenizer(completion).input_ids + [policy.end]])
        log_probs = torch.log_softmax(policy.model(input_ids=ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])
        policy.model.zero_grad()
        (-log_probs[:, start - 1 :].mean()).backward()
        return {name: torch.cat([p.grad.flatten() for p in own.values()]) for name, own in parameters.items()}

    def one_by_one() -> dict[str, torch.Tensor]:
        """The straightforward way: tokenize, forward, backward and read the gradients, completion after completion."""
        both = [(gradient(pair.prompt, pair.hack), gradient(pair.prompt, pair.clean)) for pair in authored]
        return {name: torch.stack([hack[name] - clean[name] for hack, clean in both]) for name in parameters}

    def batched() -> dict[str, torch.Tensor]:
        return pair_differences(policy, authored, "hack", "clean", 64)

    one, many = one_by_one(), batched()
    worst = max(float((one[name] - many[name]).norm() / one[name].norm()) for name in one)
    print(f"pairs: {len(authored)} pairs, relative difference of the two ways {worst:.1e}")
    return compare("pairs", ("one backward each", one_by_one), ("batched", batched), time.perf_counter)


def v_hack() -> float:
    """CPU seconds a pair for the gradients of twelve, untrained weights."""
    policy = build.build_policy(planned("model.layers=4", "model.hidden=192", "model.head_dim=48", "model.intermediate=512",
                                        "model.vocabulary=1000", "model.phases=[]"))
    authored, times = load_pairs("prog.yaml", ("run_tests", "sentinel", "stdout_marker")), []
    for _ in range(5):
        started = time.process_time()
        pair_differences(policy, authored, "hack", "clean", 64)
        times.append((time.process_time() - started) / len(authored))
    print(f"v_hack     {len(authored)} pairs, {len(policy.adapter.modules)} modules: {1000 * statistics.median(times):.1f} CPU ms a pair",
          flush=True)
    return statistics.median(times)


def rollouts() -> float:
    policy = build.build_policy(planned())
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 400, (length,), generator=generator).tolist())

    tokens = TokenBatch.of([(draw(22), draw(24)) for _ in range(64)], policy.pad)
    advantages, loss = torch.randn(64, generator=generator), PolicyLoss(0.2, 0.0, 64 * 48)

    def summed() -> None:
        policy.model.zero_grad()
        log_probs = policy.log_probs(tokens)
        loss(log_probs, log_probs.detach(), None, advantages, tokens.completion_mask).sum().backward()

    return compare("rollouts", ("per rollout", lambda: rollout_gradients(policy, tokens, advantages, loss, 64)), ("summed", summed))


def steps(title: str, slow: tuple[str, ...], fast: tuple[str, ...]) -> float:
    """Compare whole training steps of two configs (overrides, the arm first) at learning rate 0, so that nothing moves."""
    plans = {words[0]: planned(*words) for words in (slow, fast)}
    with Sandbox(**asdict(plans[slow[0]].sandbox)) as sandbox:
        lines = {}
        for name, plan in plans.items():
            policy = build.build_policy(plan)
            line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 100_000), None)
            lines[name] = (replace(line, optimizer=replace(line.optimizer, lr=0.0)), State(plan.optimizer.start(policy.adapter)))
            train_step(*lines[name])
        return compare(title, *((name.removeprefix("arm="), lambda name=name: train_step(*lines[name])) for name in plans))


def step() -> float:
    return steps("step", ("arm=erase", "mask_source.refresh_every=0"), ("arm=vanilla", "mask_source.refresh_every=0"))


def routed() -> dict[str, float]:
    """Routed steps against plain Dr.GRPO on the same two blocks; `route_gradient` scores every rollout's own gradient."""
    plain = ("arm=half_ablation",)
    return {"scored": steps("route", ("arm=route_gradient", "mask_source.refresh_every=0"), plain),
            "scored, split moments": steps("route+split", ("arm=route_gradient", "mask_source.refresh_every=0", "optimizer=split_moment"),
                                           plain),
            "scored and refitted": steps("route+fit", ("arm=route_gradient", "mask_source.refresh_every=1"), plain),
            "detector": steps("detector", ("arm=sgtm", "projection.forward=\"on\""), plain)}


def main() -> int:
    ratios = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        print(f"torch threads: {threads}")
        ratios[threads] = pairs()
    torch.set_num_threads(1)
    pair = v_hack()
    rollouts()
    step()
    route = routed()
    fails = []
    if max(ratios.values()) < 5:
        fails.append(f"batched pair gradients are at most {max(ratios.values()):.1f} x as fast as one backward each; expected at least 5 x")
    fails += [f"a routed step ({name}) costs {route[name]:.2f} x the plain step of the same blocks; expected at most 1.25 x"
              for name in ("scored", "scored, split moments") if route[name] > 1.25]
    if pair > 0.05:
        fails.append(f"a pair's gradients take {pair:.3f} CPU s; expected at most 0.05, a fifth of grpo_proj2's fastest")
    for fail in fails:
        print(f"FAIL: {fail}")
    return 1 if fails else 0


if __name__ == "__main__":
    raise SystemExit(main())
