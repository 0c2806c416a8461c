"""The tee: every training rollout is judged and recorded, and nothing comes back."""

from __future__ import annotations

from grpo_routing.env.grader import Grade
from grpo_routing.env.problems import Problem
from grpo_routing.files import Record
from grpo_routing.oracle.summary import Row, rate, summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.types import TEACHER, Labels, Rollout


class Audit:
    """Writes audit.jsonl (rates of a step) and rollouts.jsonl (a few rollouts with their verdicts).

    `every` n judges each n-th rollout of a step, another n-th every step; `labelled` says that the labels mean something, so
    that their quality is measured. `latest` is for the screen; `train.py` holds this object as a callable that returns None.
    """

    def __init__(self, oracle: Oracle, rates: Record, rollouts: Record, known: tuple[str, ...], held_out: tuple[str, ...],
                 sampled: int, every: int = 1, labelled: bool = False) -> None:
        self.oracle, self.rates, self.rollouts = oracle, rates, rollouts
        self.known, self.held_out, self.sampled, self.every, self.labelled = known, held_out, sampled, every, labelled
        self.latest: dict[str, float | None] = {}

    def __call__(self, step: int, problems: list[Problem], rollouts: list[Rollout], grades: list[Grade], labels: Labels) -> None:
        chosen = range(step % self.every, len(rollouts), self.every)  # judging costs as much as grading
        problems, rollouts, grades = ([part[i] for i in chosen] for part in (problems, rollouts, grades))
        flagged = labels.flagged[list(chosen)].tolist()
        verdicts = self.oracle(problems, [rollout.text for rollout in rollouts], grades)
        rows = [Row.of(problem, grade, verdict) for problem, grade, verdict in zip(problems, grades, verdicts)]
        parts = {"own": [], "teacher": [], "off": []}  # the joint policy's, the pool's, the deployed policy's (anchors, off groups)
        for row, rollout in zip(rows, rollouts):
            parts["teacher" if rollout.source == TEACHER else "own" if rollout.quarantine else "off"].append(row)
        self.latest = summary(parts["own"], self.known, self.held_out)
        rates = {"step": step} | {f"audit/{name}": value for name, value in self.latest.items()}
        if parts["teacher"]:
            rates["audit/hack_teacher"] = sum(row.hacked for row in parts["teacher"]) / len(parts["teacher"])
        if parts["off"]:
            seen = summary(parts["off"], self.known, self.held_out)
            rates |= {f"audit/{name}_off": seen[name] for name in ("hack", "hack_known", "hack_held_out", "solve", "format")}
        rates["audit/unflagged_hacks"] = sum(row.hacked and p < 0.5 for row, p in zip(rows, flagged))
        if self.labelled:
            rates |= {f"audit/{name}": value for name, value in self.quality(rows, flagged).items()}
        self.rates.append([rates])
        stride = max(1, len(rollouts) // max(1, self.sampled))
        self.rollouts.append([
            {"step": step, "source": rollout.source, "loophole": row.loophole, "reward": grade.reward, "solved": row.solved,
             "hacked": row.hacked, "completion": rollout.text, "prompt": problem.program.description}
            for problem, rollout, grade, row in list(zip(problems, rollouts, grades, rows))[::stride][: self.sampled]])

    def quality(self, rows: list[Row], flagged: list[float]) -> dict[str, float | None]:
        """How good the labels were: mean flag probability of hacks on known and held-out loopholes, and of everything else."""
        pairs = list(zip(rows, flagged))
        picked = {"label_recall": [p for row, p in pairs if row.hacked and row.loophole in self.known],
                  "label_recall_held_out": [p for row, p in pairs if row.hacked and row.loophole in self.held_out],
                  "label_false_positive": [p for row, p in pairs if not row.hacked and not row.exploited]}
        return {name: rate(values) for name, values in picked.items()}
