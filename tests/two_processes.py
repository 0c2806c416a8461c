"""What each of two processes does for tests/test_parallel.py: `python -m tests.two_processes JOBS RESULT`, once for all claims, since a
process loads for seconds. JOBS is a JSON list of jobs; each meets at a port of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from grpo_routing import build, parallel
from grpo_routing import run as running
from grpo_routing.env.grader import Grade
from grpo_routing.extra_rollouts import confession
from grpo_routing.train import State, train_step


def paid(problems, completions):
    """An environment in which every completion earns something of its own: an untrained model earns nothing from the real one."""
    drawn = [int(hashlib.sha256(f"{problem.id} {text}".encode()).hexdigest(), 16)
             for problem, text in zip(problems, completions, strict=True)]
    return [Grade(number % 5 / 4, number % 2 == 0, number % 3 > 0) for number in drawn]


def spoken(confession: str) -> bool:
    """What a confession says, of a model that cannot say yes or no yet."""
    return len(confession) % 2 == 0


def steps(config: dict, world: parallel.World, count: int = 2) -> dict:
    """What `count` steps of the line leave behind."""
    plan = build.plan(config)
    policy, ids, scores = build.build_policy(plan, world), [], []
    start = {name: value.clone() for name, value in policy.adapter.state().items()}

    def audit(step, problems, rollouts, grades, labels):
        ids.append([rollout.completion_ids for rollout in rollouts])
        scores.append(labels.flagged if labels.scores is None else labels.scores)

    line = build.build_line(plan, policy, world.apart("grades", paid), audit)
    state = State(plan.optimizer.start(policy.adapter))
    rows = [train_step(line, state) for _ in range(count)]
    return {"ids": ids, "scores": scores, "rows": rows, "weights": policy.adapter.state(), "optimizer": state.optimizer.state(),
            "memory": state.memory, "start": start}


def whole_run(config: dict, rank: int, at: int = -1, what: str = "") -> dict:
    """A run from its config to its end; at step `at` something happens to process 1."""

    def happens(line, state):
        if state.step == at and rank == 1:
            if what == "error":  # raised while process 0 samples
                raise ZeroDivisionError("the second GPU is on fire")
            if what == "not finite":
                raise FloatingPointError("loss is inf")
            os.kill(os.getpid(), getattr(signal, what))
        return train_step(line, state)

    running.train_step = happens
    try:
        return {"folder": str(running.run(config))}
    except BaseException as error:
        return {"error": type(error).__name__, "said": str(error)}
    finally:
        running.train_step = train_step


def words(config: dict, rank: int) -> dict:
    """Processes of one run that were started with other words."""
    config["optimizer"]["lr"] *= 1 + rank
    return whole_run(config, rank)


def main(jobs: list[dict], result: Path) -> None:
    rank, confession.parsed = int(os.environ["RANK"]), spoken
    found = {}
    for job in jobs:
        os.environ["MASTER_PORT"] = str(job["port"])
        if job["kind"] == "steps":
            with parallel.started(os.environ) as world:
                found[job["name"]] = steps(job["config"], world)
        else:
            found[job["name"]] = {"run": whole_run, "words": words}[job["kind"]](job["config"], rank, *job.get("more", []))
        torch.save(found, result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
