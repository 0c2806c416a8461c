"""The tee: every training rollout is judged and recorded, and nothing comes back."""

from __future__ import annotations

import math
from pathlib import Path

from grpo_routing.env.grader import Grade
from grpo_routing.env.problems import Problem
from grpo_routing.files import Record
from grpo_routing.oracle.quality import quality
from grpo_routing.oracle.summary import Row, summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.types import TEACHER, Labels, Rollout


class Audit:
    """Writes audit.jsonl (rates of a step), rollouts.jsonl (a few rollouts with their verdicts) and, where labels mean something,
    scores.jsonl (score, flag and verdict of every judged rollout, for histograms).

    `every` n judges each n-th rollout of a step, another n-th every step; `kind` is that of the mask source: the quality of
    labels, or of a subspace's scores, is measured against the verdicts (quality.py). `latest` is for the screen; `train.py` holds this
    object as a callable that returns None. Without `writes` it only asks the oracle, which the processes of a run share.
    """

    def __init__(self, oracle: Oracle, folder: Path, known: tuple[str, ...], held_out: tuple[str, ...],
                 sampled: int, every: int = 1, kind: str = "none", writes: bool = True) -> None:
        self.oracle = oracle
        self.rates, self.rollouts, self.scores = (Record(folder / f"{name}.jsonl", writes) for name in ("audit", "rollouts", "scores"))
        self.known, self.held_out, self.sampled, self.every, self.kind = known, held_out, sampled, every, kind
        self.latest: dict[str, float | None] = {}

    def __call__(self, step: int, problems: list[Problem], rollouts: list[Rollout], grades: list[Grade], labels: Labels) -> None:
        chosen = range(step % self.every, len(rollouts), self.every)  # judging costs as much as grading
        problems, rollouts, grades = ([part[i] for i in chosen] for part in (problems, rollouts, grades))
        flagged = labels.flagged[list(chosen)].tolist()
        scores = flagged if labels.scores is None else labels.scores[list(chosen)].tolist()
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
        if self.kind in ("rollout", "subspace"):
            rates |= {f"audit/{name}": value for name, value in quality(rows, flagged, scores, self.known, self.held_out).items()
                      if self.kind == "rollout" or "auroc" in name}
            self.scores.append([{"step": step, "score": [None if math.isnan(s) else round(s, 6) for s in scores], "flag": flagged,
                                 "hacked": [row.hacked for row in rows], "exploited": [row.exploited for row in rows],
                                 "loophole": [row.loophole for row in rows]}])
        self.rates.append([rates])
        stride = max(1, len(rollouts) // max(1, self.sampled))
        self.rollouts.append([
            {"step": step, "source": rollout.source, "loophole": row.loophole, "reward": grade.reward, "solved": row.solved,
             "hacked": row.hacked, "completion": rollout.text, "prompt": problem.program.description}
            for problem, rollout, grade, row in list(zip(problems, rollouts, grades, rows))[::stride][: self.sampled]])
