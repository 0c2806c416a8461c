"""What a whole GRPO step costs, and where: isolated grading included, against TRL's trainer when it is installed.

    python -m benchmarks.step             # arms side by side, parts of a step, TRL (pip install 'grpo_routing[bench]')
    python -m benchmarks.step scaling     # the same step with more rollouts, tokens, width, rank, grading processes

The workload is that of our neighbours' measurements: a Qwen3 of random weights (4 layers, width 192, 4 heads, feed-forward 512), prompts of
about 260 tokens, 4 prompts x 8 completions x 64 tokens. A random model writes no program, so every completion is graded as one that is
right, made different by a comment; nothing is remembered between steps. CPU seconds of the process and its children, medians of interleaved
rounds; on CUDA, if there is any, also seconds of the clock and the allocator's peak.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.grader import BASELINE, CALLS, PROGRAM
from benchmarks.gradient import planned
from benchmarks.measure import cpu_seconds, interleaved, table
from grpo_routing import build, train
from grpo_routing.env.grader import Grade, Grader
from grpo_routing.env.problems import Problem
from grpo_routing.env.sandbox import Sandbox, Submission
from grpo_routing.train import Line, State, train_step

ROUNDS = 5
MODEL = {"model": "tiny_random", "model.hidden": 192, "model.layers": 4, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 48,
         "model.intermediate": 512, "model.vocabulary": 1000, "model.tokenizer_examples": 1000}
SIZE = {"trainer.prompts_per_step": 4, "trainer.group": 8, "trainer.max_new_tokens": 64, "adapter.rank": 8, "sandbox.workers": 2}
PROMPT = 260  # tokens
ARMS = {"vanilla": ("arm=vanilla", "trainer.audit_every=1"),
        "erase": ("arm=erase", "mask_source.refresh_every=1", "trainer.audit_every=32"),
        "two blocks, no mask": ("arm=half_ablation", "optimizer=split_moment"),
        "routed by gradient scores": ("arm=route_gradient", "optimizer=split_moment", "mask_source.refresh_every=0")}
QUOTED = {"grpo_proj2, erase": 12.4, "TRL 1.16, one subprocess per completion": 8.6}  # perf.md, another day, one thread
SCALING = {"rollouts": ("trainer.prompts_per_step", (2, 4, 8, 16)), "new tokens": ("trainer.max_new_tokens", (16, 64, 128, 256)),
           "width": ("model.hidden", (96, 192, 384)), "adapter rank": ("adapter.rank", (4, 8, 32, 64)),
           "grading processes": ("sandbox.workers", (1, 2, 4))}
PARTS = ("sampling", "grading", "extraction", "update")


class Graded:
    """Runs a right program for every completion, each time another text, so that every one is executed."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.count = sandbox, 0

    def __call__(self, problems: list[Problem], completions: list[str]) -> list[Grade]:
        programs = [Submission(f"{PROGRAM}\n# {self.count + place}", "longest", CALLS) for place in range(len(completions))]
        self.count += len(completions)
        passed = [outcome.status == "ok" for outcome in self.sandbox.run_many(programs)]
        # Rewards that differ within a group, or there would be nothing to learn and nothing to update.
        return [Grade(float(right) * (place % 3 > 0), right, right) for place, right in enumerate(passed)]


class Parts:
    """CPU seconds of the parts of a step; what is left is the update."""

    def __init__(self, names: tuple[str, ...] = PARTS) -> None:
        self.spent = dict.fromkeys(names, 0.0)

    def timed(self, part: str, work: Callable) -> Callable:
        def wrapped(*words: object, **more: object) -> object:
            before = cpu_seconds()
            try:
                return work(*words, **more)
            finally:
                self.spent[part] += cpu_seconds() - before

        return wrapped


@contextmanager
def prepared(words: tuple[str, ...], size: dict[str, object], parts: Parts) -> Iterator[Callable[[], None]]:
    """A function that takes one training step, at a learning rate of 0 so that every step is the same work."""
    plan = planned(*words, *(f"{key}={value}" for key, value in (MODEL | SIZE | size).items()))
    policy = build.build_policy(plan)
    if torch.cuda.is_available():
        policy.model.to("cuda")
    with Sandbox(**asdict(plan.sandbox)) as sandbox:
        line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 0), None)
        policy.sample = parts.timed("sampling", policy.sample)
        line = replace(line, grader=parts.timed("grading", Graded(sandbox)), prompt=Padded(line, PROMPT),
                       optimizer=replace(line.optimizer, lr=0.0))
        state = State(plan.optimizer.start(policy.adapter))
        yield lambda: train_step(line, state)


class Padded:
    """Prompts of a given number of tokens: the environment's own, repeated."""

    def __init__(self, line: Line, tokens: int) -> None:
        self.plain, self.encode, self.tokens = line.prompt, line.policy.encode, tokens

    def __call__(self, problem: Problem) -> str:
        text = self.plain(problem)
        return text * max(1, round(self.tokens / len(self.encode(text))))

    train = __call__


def compare() -> None:
    """Arms side by side, each with the parts of its step, and TRL."""
    rows = []
    with side_by_side() as steps:
        works = {name: work for name, (work, _) in steps.items()}
        medians = interleaved(works, ROUNDS)
        for name, (_, parts) in steps.items():
            share = {part: parts.spent[part] / (ROUNDS + 1) for part in PARTS}
            share["update"] = medians[name] - sum(share.values())
            rows.append([name, medians[name], medians[name] / medians["vanilla"], *share.values(), 32 * 64 / share["sampling"]])
        print(table(["32 rollouts x 64 tokens, one thread", "CPU s", "/ vanilla", *PARTS, "tokens / CPU s"], rows))
        routed = medians["routed by gradient scores"] / medians["two blocks, no mask"]
        print(f"\nrouted by gradient scores / the same two blocks without a mask: {routed:.2f} (target 1.25)")
        for name, seconds in QUOTED.items():
            print(f"{name}: {seconds} s quoted from perf.md; {seconds / medians['erase']:.1f} x our erase step")
        found = trl_step(works["erase"])
    if found:
        theirs, ours = found
        print(f"TRL here, interleaved: {theirs:.2f} CPU s a step against {ours:.2f} of our erase step: {theirs / ours:.1f} x (target 4)")
    else:
        print("TRL is not installed: pip install 'grpo_routing[bench]' to measure it here")


@contextmanager
def side_by_side() -> Iterator[dict[str, tuple[Callable[[], None], Parts]]]:
    """Every arm ready to step, with a clock of its own. Extraction happens in train.refresh, which is common to all arms."""
    with ExitStack() as stack:
        found, plain = {}, train.refresh
        for name, words in ARMS.items():
            parts = Parts()
            step = stack.enter_context(prepared(words, {}, parts))

            def work(step: Callable = step, parts: Parts = parts) -> None:
                train.refresh = parts.timed("extraction", plain)
                try:
                    step()
                finally:
                    train.refresh = plain

            found[name] = (work, parts)
        yield found


def trl_step(ours: Callable[[], object]) -> tuple[float, float] | None:
    """Median CPU seconds of a step of TRL's GRPOTrainer with a LoRA of the same rank, and of ours, step by step in turn. None when TRL is
    not installed."""
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    plan = planned("arm=vanilla", *(f"{key}={value}" for key, value in (MODEL | SIZE).items()))
    policy = build.build_policy(plan)
    line = build.build_line(plan, policy, None, None)
    prompts = [Padded(line, PROMPT)(problem) for problem in line.problems[:64]]
    model, tokenizer = plan.model.load()
    spent: dict[str, list[float]] = {"theirs": [], "ours": []}

    class Turns(TrainerCallback):
        before = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.before = self.before or cpu_seconds()

        def on_step_end(self, *_: object, **__: object) -> None:
            spent["theirs"].append(cpu_seconds() - self.before)
            before = cpu_seconds()
            ours()
            spent["ours"].append(cpu_seconds() - before)
            self.before = cpu_seconds()

    def reward(completions: list[str], **_: object) -> list[float]:
        request = json.dumps([PROGRAM, "longest", CALLS])

        def one(_: str) -> float:
            return float(bool(subprocess.run([sys.executable, "-I", "-S", "-c", BASELINE], input=request, capture_output=True, text=True,
                                             check=True).stdout))

        with ThreadPoolExecutor(2) as pool:
            return [got * (place % 3 > 0) for place, got in enumerate(pool.map(one, completions))]

    with TemporaryDirectory() as folder:
        settings = GRPOConfig(output_dir=folder, per_device_train_batch_size=32, num_generations=8, max_completion_length=64, beta=0.0,
                              loss_type="dr_grpo", learning_rate=1e-5, max_steps=ROUNDS + 1, report_to=[], save_strategy="no",
                              logging_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
                              temperature=1.0, disable_tqdm=True)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        GRPOTrainer(model, reward, args=settings, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
                    peft_config=lora, callbacks=[Turns()]).train()
    return statistics.median(spent["theirs"][1:]), statistics.median(spent["ours"][1:])


def scaling() -> None:
    """The erase step with one size changed at a time."""
    base, rows = None, []
    for title, (key, values) in SCALING.items():
        for value in values:
            wide = {"model.head_dim": value // 4, "model.intermediate": 8 * value // 3} if key == "model.hidden" else {}
            size = {key: value} | wide
            with prepared(ARMS["erase"], size, Parts()) as step:
                before = resident(reset=True)
                seconds = interleaved({"step": step}, 3)["step"]
                peak = resident() - before
            shown = 8 * value if title == "rollouts" else value
            rows.append([title, shown, seconds, peak / 2**20])
            if value == (MODEL | SIZE).get(key) and base is None:
                base = seconds
            print(f"{title} {shown}: {seconds:.2f} CPU s, {peak / 2**20:.0f} MB more than before", file=sys.stderr, flush=True)
    print(table(["size", "value", "CPU s a step", "/ default", "MB while stepping"], [[*row[:3], row[2] / base, row[3]] for row in rows]))


def resident(reset: bool = False) -> int:
    """Bytes: the highest resident memory since the last reset; with `reset`, what is resident now."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmRSS" if reset else "VmHWM"].split()[0])


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    started = time.time()
    scaling() if words == ["scaling"] else compare()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak resident memory of the process {peak:.0f} MB; {time.time() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
