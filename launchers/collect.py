"""results.parquet and the report of a sweep, finished or not: one row per run and state of the policy, every run of the plan."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
from pyarrow import parquet

from grpo_routing import report
from grpo_routing.results import FIELDS, RATES
from launchers.plan import SweepPlan
from launchers.status import RunStatus

NUMBERS = {*RATES, "last5_hack", "last5_solve"}
COUNTS = {"seed", "steps", "samples", "samples_known", "samples_held_out", "samples_all", "turns"}
FLAGS = {"imitation", "uses_oracle", "same_policy", "pays"}


def collect(plan: SweepPlan, found: list[RunStatus]) -> str:
    """Write both; returns the report's text. What a run has not measured yet is null. Raises ReportError for a damaged file."""
    text = report.write(plan.root)
    state = {one.entry.folder: one for one in found}
    rows = report.load(plan.root)
    for row in rows:
        one = state.get(row["run"])
        row |= {"launch_state": one.state if one else None, "launch_cause": (one.cause or None) if one else None,
                "turns": one.turns if one else None}
    modes = sorted({key for row in rows for key in row} - {*FIELDS, "launch_state", "launch_cause", "turns"})
    columns = [*FIELDS, *modes, "launch_state", "launch_cause", "turns"]
    schema = pyarrow.schema([(name, kind(name, modes)) for name in columns])
    write(pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema=schema),
          plan.root / "results.parquet")
    return text


def kind(name: str, modes: list[str]) -> pyarrow.DataType:
    """The same type whether or not anything was measured, so that files of two sweeps can be put together."""
    if name in NUMBERS or name in modes:
        return pyarrow.float64()
    return pyarrow.int64() if name in COUNTS else pyarrow.bool_() if name in FLAGS else pyarrow.string()


def write(table: pyarrow.Table, file: Path) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        parquet.write_table(table, part)
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
