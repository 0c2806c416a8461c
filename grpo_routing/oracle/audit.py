"""The tee: every training rollout is judged and recorded, and nothing comes back."""

from __future__ import annotations

from grpo_routing.env.grader import Grade
from grpo_routing.env.problems import Problem
from grpo_routing.files import Record
from grpo_routing.oracle.summary import Row, summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.types import STUDENT, Rollout


class Audit:
    """Writes audit.jsonl (rates of a step) and rollouts.jsonl (a few rollouts with their verdicts).

    `latest` is for the screen; `train.py` holds this object as a callable that returns None.
    """

    def __init__(self, oracle: Oracle, rates: Record, rollouts: Record, known: tuple[str, ...], held_out: tuple[str, ...],
                 sampled: int) -> None:
        self.oracle, self.rates, self.rollouts = oracle, rates, rollouts
        self.known, self.held_out, self.sampled = known, held_out, sampled
        self.latest: dict[str, float | None] = {}

    def __call__(self, step: int, problems: list[Problem], rollouts: list[Rollout], grades: list[Grade]) -> None:
        verdicts = self.oracle(problems, [rollout.text for rollout in rollouts], grades)
        rows = [Row.of(problem, grade, verdict) for problem, grade, verdict in zip(problems, grades, verdicts)]
        own = [row for row, rollout in zip(rows, rollouts) if rollout.source == STUDENT]
        taught = [row for row, rollout in zip(rows, rollouts) if rollout.source != STUDENT]
        self.latest = summary(own, self.known, self.held_out)
        rates = {"step": step} | {f"audit/{name}": value for name, value in self.latest.items()}
        if taught:
            rates["audit/hack_teacher"] = sum(row.hacked for row in taught) / len(taught)
        self.rates.append([rates])
        stride = max(1, len(rollouts) // max(1, self.sampled))
        self.rollouts.append([
            {"step": step, "source": rollout.source, "loophole": row.loophole, "reward": grade.reward, "solved": row.solved,
             "hacked": row.hacked, "completion": rollout.text, "prompt": problem.program.description}
            for problem, rollout, grade, row in list(zip(problems, rollouts, grades, rows))[::stride][: self.sampled]])
