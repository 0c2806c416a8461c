"""Will it fit, and how long is a step? An estimate before a job is submitted, from shapes alone (footprint.py).

    python -m grpo_routing.fit model=qwen3_4b trainer=fast arm=graft --device h100
    python -m grpo_routing.fit model=qwen3_4b model.path=FOLDER --memory 48 --tflops 180 --bandwidth 900

Memory: what is resident, plus the larger of sampling, update and optimizer step. Time: two floors for sampling and update, of operations
and of bytes, at the device's published peak, and an estimate at a stated efficiency. Completions are taken to run to their end and every
group to have an advantage, so both are upper bounds in that respect.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from grpo_routing.build import ConfigError, Plan
from grpo_routing.composed import planned
from grpo_routing.decoder import SHORT
from grpo_routing.footprint import Footprint, Sizes, chunk_bytes, footprint, keeps, rollouts

GB = 1e9


@dataclass(frozen=True)
class Device:
    """Published dense bfloat16 (cpu: float32) TFLOP/s, memory bandwidth in GB/s and memory in GB; the shares of the two peaks that are
    taken to be reached."""

    tflops: float
    bandwidth: float
    memory: float
    efficiency: float = 0.4
    bandwidth_efficiency: float = 0.6


DEVICES = {
    "h100": Device(989, 3350, 80), "h200": Device(989, 4800, 141), "a100": Device(312, 2039, 80), "l40s": Device(362, 864, 48),
    "rtx4090": Device(165, 1008, 24), "cpu": Device(0.16, 20, 8),  # two cores with AVX-512 at 2.5 GHz
}
RESERVE = 0.05  # of the device's memory, for its driver and for holes between tensors: an allowance, not a measurement
GRADED = 240.0  # submissions a second and worker (docs/log.md: 479 with two)
CHARACTERS = 3.0  # of a prompt per token, where it is not said how long prompts are


@dataclass(frozen=True)
class Memory:
    """Bytes by term, in three phases that do not overlap, beside what is always there."""

    resident: dict[str, float]
    phases: dict[str, dict[str, float]]

    @property
    def largest(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def total(self) -> float:
        return sum(self.resident.values()) + sum(self.phases[self.largest].values())


def memory_of(plan: Plan, sizes: Sizes, found: Footprint) -> Memory:
    t = plan.trainer
    micro, batch = min(t.micro_batch, rollouts(plan)), rollouts(plan)
    rows = min(t.prompts_per_forward, t.prompts_per_step) * t.group
    asked = min(t.prompts_per_forward, t.prompts_per_step)
    own = sizes.completion + (sizes.prompt if sizes.prompt <= SHORT else 0)  # after short prompts every row has its prompt's too
    sums = 2 * 4 * found.adapter_numbers
    logits = chunk_bytes(found.vocabulary, micro * sizes.completion)
    height = found.update_peak - found.saved
    return Memory(
        {"frozen weights": found.parameters, "adapter": found.adapter, "optimizer's moments": 2 * found.adapter},
        {"sampling": {
            "weights with the adapter folded in": found.folded,
            "small projections side by side": found.joined,
            "keys and values of prompts": found.cache_per_token * asked * sizes.prompt,
            "keys and values of rows, and of those left when a quarter has ended": 1.75 * found.cache_per_token * rows * own,
            "forward of the prompts": max(0.0, found.prefill_peak - found.cache_per_token * asked * sizes.prompt),
            "logits of one token a row": rows * found.vocabulary * (found.itemsize + 4 + 4 + 8 + 8)},
         "update": {
            "sums of gradients (routed, natural)": sums,
            "every rollout's gradient, read by the mask": 4 * found.adapter_numbers * batch if keeps(plan) else 0.0,
            f"activations of {micro} rollouts": found.saved,
            "two chunks of logits": min(height, logits),
            "per-rollout gradients and temporaries": max(0.0, height - logits)},
         "optimizer step": {"sums of gradients": sums, "copies of the adapter": 4 * found.adapter}})


@dataclass(frozen=True)
class Time:
    """Seconds of a step's part: the floor of operations, that of bytes, and the estimate."""

    operations: float
    bytes: float
    estimate: float


def times_of(plan: Plan, sizes: Sizes, found: Footprint, device: Device) -> dict[str, Time]:
    t = plan.trainer
    prompts, batch = t.prompts_per_step + plan.extra_rollouts.groups, rollouts(plan)
    forwards, passes = math.ceil(prompts / t.prompts_per_forward), math.ceil(batch / t.micro_batch)
    read = forwards * found.decoded * sizes.completion + found.cache_per_token * sizes.completion * (
        prompts * sizes.prompt + batch * sizes.completion / 2)
    sampled = forwards * found.prefill_operations + batch * sizes.completion * found.decode_operations

    def time(operations: float, moved: float) -> Time:
        floors = operations / (device.tflops * 1e12), moved / (device.bandwidth * 1e9)
        return Time(*floors, max(floors[0] / device.efficiency, floors[1] / device.bandwidth_efficiency))

    return {"sampling": time(sampled, read),
            "update": time(passes * found.update_operations, passes * (2 * found.parameters + 2 * found.saved)),
            "grading": Time(0.0, 0.0, batch / (GRADED * plan.sandbox.workers))}


def knob(plan: Plan, memory: Memory, found: Footprint, limit: float) -> str:
    """What to turn when it does not fit."""
    resident, phase = sum(memory.resident.values()), memory.largest
    if resident >= limit:
        return "the weights and the adapter's state alone do not fit: take a device with more memory, or a smaller model"
    terms = memory.phases[phase]
    if phase == "sampling":
        return f"lower trainer.prompts_per_forward (now {plan.trainer.prompts_per_forward}); nothing else changes with it"
    kept = terms.get("every rollout's gradient, read by the mask", 0.0)
    if phase == "update" and resident + kept + terms["sums of gradients (routed, natural)"] < limit:
        micro = min(plan.trainer.micro_batch, rollouts(plan))
        most = int((limit - resident - kept - terms["sums of gradients (routed, natural)"]) / (found.update_peak / micro))
        if most >= 1:
            return f"set trainer.micro_batch={most} (now {plan.trainer.micro_batch}); it never changes a result"
    if kept:
        return ("every rollout's gradient is kept because the mask source or the advantage reads it: lower adapter.rank or "
                "trainer.prompts_per_step, or choose a source that decides before the backward")
    return "lower adapter.rank, or trainer.max_new_tokens"


def report(plan: Plan, sizes: Sizes, guessed: bool, name: str, device: Device, console: Console) -> bool:
    """Print the tables; whether it fits."""
    found = footprint(plan, sizes)
    memory, limit = memory_of(plan, sizes, found), device.memory * GB * (1 - RESERVE)
    fits = memory.total <= limit
    console.print(f"{rollouts(plan)} rollouts a step, prompts of {sizes.prompt} tokens{' (a guess: --prompt-tokens)' if guessed else ''}, "
                  f"completions of {sizes.completion}; {found.adapter_numbers:,.0f} trainable numbers")
    table = Table("memory", "GB", title=f"peak on {name}, of {device.memory:g} GB", title_justify="left")
    for term, size in memory.resident.items():
        table.add_row(term, f"{size / GB:.3f}")
    for phase, terms in memory.phases.items():
        table.add_section()
        table.add_row(f"{phase}{', the largest' if phase == memory.largest else ''}", f"{sum(terms.values()) / GB:.3f}", style="bold")
        for term, size in terms.items():
            table.add_row(f"  {term}", f"{size / GB:.3f}")
    table.add_section()
    table.add_row("weights and state, and the largest phase", f"{memory.total / GB:.3f}", style="bold")
    console.print(table)
    verdict = "fits" if fits else "DOES NOT FIT"
    console.print(f"{verdict} in {device.memory:g} GB with {RESERVE:.0%} left aside: {memory.total / GB:.1f} of {limit / GB:.1f} GB"
                  + ("" if fits else f". {knob(plan, memory, found, limit)}"))
    if "pairs" in plan.mask_source.reads or plan.mask_source.kind in ("subspace", "trusted"):
        console.print("not counted: the fit of the mask source on its pairs, one backward of mask_source.micro_batch pairs")
    spent = times_of(plan, sizes, found, device)
    table = Table("a step", "floor of operations, s", "floor of bytes, s", "estimate, s", title="time, not measured", title_justify="left")
    for part, time in spent.items():
        floors = ("–", "–") if part == "grading" else (f"{time.operations:.3f}", f"{time.bytes:.3f}")
        table.add_row(part, *floors, f"{time.estimate:.2f}")
    whole = sum(time.estimate for time in spent.values())
    table.add_section()
    table.add_row("step", "", "", f"{whole:.2f}")
    console.print(table)
    console.print(f"estimate: {device.efficiency:.0%} of {device.tflops:g} TFLOP/s, {device.bandwidth_efficiency:.0%} of "
                  f"{device.bandwidth:g} GB/s, {GRADED:g} submissions a second and worker. {plan.trainer.steps} steps: "
                  f"{plan.trainer.steps * whole / 3600:.2f} h, without evaluation. Models of a few layers are bound by Python instead, "
                  "and take longer")
    return fits


def prompt_tokens(plan: Plan) -> int:
    """Of the longest of some prompts, guessed from their characters."""
    problems = plan.dataset.training(plan.loophole)[:200]
    return math.ceil(max(len(plan.prompt(problem)) for problem in problems) / CHARACTERS)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.fit", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="group=option words, as for python -m grpo_routing")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    for option, said in (("memory", "GB"), ("tflops", "dense TFLOP/s"), ("bandwidth", "GB/s"), ("efficiency", "reached share of tflops"),
                         ("bandwidth-efficiency", "reached share of bandwidth")):
        parser.add_argument(f"--{option}", type=float, help=f"{said}; the device's when left out")
    parser.add_argument("--prompt-tokens", type=int, help="tokens of the longest prompt; guessed from characters when left out")
    chosen = parser.parse_intermixed_args(words)
    given = {key: getattr(chosen, key) for key in ("memory", "tflops", "bandwidth", "efficiency", "bandwidth_efficiency")}
    if bad := [key for key, value in given.items() if value is not None and not value > 0]:
        parser.error(f"--{bad[0].replace('_', '-')} must be positive; got {given[bad[0]]}")
    if chosen.prompt_tokens is not None and chosen.prompt_tokens < 1:
        parser.error(f"--prompt-tokens must be at least 1; got {chosen.prompt_tokens}")
    device = replace(DEVICES[chosen.device], **{key: value for key, value in given.items() if value is not None})
    try:
        plan = planned(chosen.overrides)
        sizes = Sizes(chosen.prompt_tokens or prompt_tokens(plan), plan.trainer.max_new_tokens)
        return 0 if report(plan, sizes, chosen.prompt_tokens is None, chosen.device, device, Console()) else 1
    except ConfigError as error:
        print(f"config refused:\n{error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
