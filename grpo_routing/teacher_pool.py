"""Build a frozen pool of graded rollouts from a finished run, for `extra_rollouts=teacher`.

    python -m grpo_routing.teacher_pool outputs/first/runs/vanilla-… [--to FILE] [--samples 8]

The run's final policy answers its own training problems. What the flawed environment paid is kept beside each answer;
what is true about it is not, because a pool must not carry a verdict into training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from grpo_routing import build
from grpo_routing.checkpoint import load_checkpoint
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.files import Record, write_atomic
from grpo_routing.rollout import sample_rollouts
from grpo_routing.train import State


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.teacher_pool", description="Build a teacher pool from a finished run.")
    parser.add_argument("run", type=Path, help="a run folder with a checkpoint")
    parser.add_argument("--to", type=Path, help="the pool's file (default: teacher_pool.jsonl in the run's cache)")
    parser.add_argument("--samples", type=int, default=8, help="rollouts per problem")
    asked = parser.parse_args(words)
    if not (asked.run / "checkpoints" / "latest").exists():
        print(f"{asked.run} has no checkpoint; expected a run folder such as outputs/first/runs/vanilla-…", file=sys.stderr)
        return 2
    plan = build.plan(OmegaConf.to_container(OmegaConf.load(asked.run / "config.yaml"), resolve=True))
    target = asked.to or Path(plan.cache) / "teacher_pool.jsonl"
    rows = pool(plan, asked.run, asked.samples)
    write_atomic(target, b"")
    Record(target).append(rows)
    print(f"{target}: {len(rows)} rollouts of {len({row['prompt'] for row in rows})} prompts, "
          f"{sum(row['passed'] for row in rows) / len(rows):.2f} paid")
    return 0


def pool(plan: build.Plan, run: Path, samples: int) -> list[dict]:
    """One row per rollout: prompt, completion, loophole, and what the environment paid."""
    policy, trainer = build.build_policy(plan), plan.trainer
    load_checkpoint(run / "checkpoints", policy.adapter, State(plan.optimizer.start(policy.adapter)))
    problems = plan.dataset.training(plan.loophole)
    rollouts = sample_rollouts(policy, [plan.prompt(problem) for problem in problems], [samples] * len(problems),
                               (plan.seed, "teacher"), trainer.max_new_tokens, trainer.temperature, trainer.prompts_per_forward)
    asked = [problems[rollout.group] for rollout in rollouts]
    with Sandbox(**asdict(plan.sandbox)) as sandbox:
        grades = Grader(sandbox, plan.reward.format_reward, plan.reward.pass_reward, memory=100_000)(asked, [r.text for r in rollouts])
    return [{"prompt": plan.prompt(problem), "completion": rollout.text, "loophole": problem.loophole} | asdict(grade)
            for problem, rollout, grade in zip(asked, rollouts, grades)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
