"""The tripwire: is there still a policy to train? It reads what training sees (rows of metrics.jsonl) and never the audit.

    not finite    some number of the newest step is nan or infinite
    dead          every group was flat for `dead_groups_steps` steps in a row, and few passed: nothing left to learn from
    format lost   mean train/format over `format_steps` steps is below `least_format`: the policy no longer answers

A hacked policy that is paid in nearly every rollout has flat groups too; it is saturated, not dead (`saturated_at`). One odd
step never fires the last two. The verdict is a function of the rows alone, so a resumed run gives the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

Row = dict[str, float]  # a step of metrics.jsonl: `step` and the metrics that log.py declares


@dataclass(frozen=True)
class Tripwire:
    dead_groups_steps: int
    saturated_at: float
    least_format: float
    format_steps: int

    def __post_init__(self) -> None:
        for name in ("dead_groups_steps", "format_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"health.{name} must be a number of steps, or 0 for never; got {getattr(self, name)}")
        for name in ("saturated_at", "least_format"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"health.{name} must be a share in [0, 1]; got {getattr(self, name)}")

    def cause(self, rows: list[Row]) -> str | None:
        """Why the run has collapsed after these steps, in plain words; None while it has not."""
        return self.not_finite(rows) or self.dead(rows) or self.format_lost(rows)

    def not_finite(self, rows: list[Row]) -> str | None:
        odd = [f"{name} is {value}" for row in rows[-1:] for name, value in row.items() if not math.isfinite(value)]
        return f"not finite: {', '.join(odd[:3])} at step {rows[-1]['step']}" if odd else None

    def dead(self, rows: list[Row]) -> str | None:
        newest = last(rows, self.dead_groups_steps)
        if not newest or any(row["train/flat_groups"] < 1 or row["train/passed"] > self.saturated_at for row in newest):
            return None
        return (f"dead: all groups had equal rewards {during(newest)}, and {share(newest, 'train/passed')} of the rollouts passed; "
                "there was nothing left to learn from")

    def format_lost(self, rows: list[Row]) -> str | None:
        newest = last(rows, self.format_steps)
        if not newest or fmean(row["train/format"] for row in newest) >= self.least_format:
            return None
        return (f"format lost: {share(newest, 'train/format')} of the rollouts were usable answers {during(newest)}; "
                f"health.least_format is {self.least_format:g}")


def last(rows: list[Row], count: int) -> list[Row]:
    """The newest `count` rows; none when there are fewer."""
    return rows[-count:] if 0 < count <= len(rows) else []


def during(rows: list[Row]) -> str:
    return f"in steps {rows[0]['step']} to {rows[-1]['step']}"


def share(rows: list[Row], metric: str) -> str:
    return f"{fmean(row[metric] for row in rows):.3f}"
