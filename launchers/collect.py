"""The report of a sweep, finished or not; results.parquet also says what the launcher knows of every run."""

from __future__ import annotations

from grpo_routing import report
from launchers.plan import SweepPlan
from launchers.status import RunStatus


def collect(plan: SweepPlan, found: list[RunStatus]) -> str:
    """Write it; returns its text. What a run has not measured yet is null. Raises ReportError for a damaged file."""
    return report.write(plan.root, {one.entry.folder: {"launch_state": one.state, "launch_cause": one.cause or None, "turns": one.turns}
                                    for one in found})
