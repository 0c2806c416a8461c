"""results.parquet: one row per run and state of the policy, of every run, finished or not. What notebooks and other programs read.

The columns are those of results.json (results.py), then

    label              the row of report.md that the run is averaged in, so that no mean mixes two recipes of one arm
    setting            what two rows must share before they are compared (comparison.py), as a hash
    hack_<mode>        of every loophole that some run evaluated
    launch_state, launch_cause, turns    what the launcher says of the run; null unless `launchers collect` wrote the file

Null is what was not measured; label and setting are null where a run is not finished and in no row. A column has the same type in every
file, so that files of several experiments can be put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow
from pyarrow import parquet

from grpo_routing.arms import Arm, group
from grpo_routing.comparison import shared
from grpo_routing.files import write_atomic
from grpo_routing.results import FIELDS, RATES, Run, flat_objects

FILE = "results.parquet"
OF_ROW, OF_LAUNCH = ("label", "setting"), ("launch_state", "launch_cause", "turns")
NUMBERS = {*RATES, "last5_hack", "last5_solve"}
COUNTS = {"seed", "steps", "samples", "samples_known", "samples_held_out", "samples_all", "turns"}
FLAGS = {"imitation", "uses_oracle", "same_policy", "pays"}


def write_parquet(experiment: Path, runs: Sequence[Run], launched: Mapping[str, dict]) -> None:
    """`launched` is run -> OF_LAUNCH, empty where no launcher was asked. The same runs give the same bytes."""
    screen = pyarrow.BufferOutputStream()
    parquet.write_table(table(runs, launched), screen)
    write_atomic(experiment / FILE, screen.getvalue().to_pybytes())


def table(runs: Sequence[Run], launched: Mapping[str, dict]) -> pyarrow.Table:
    rows = flat_objects(runs)
    of_run = {run.name: {"label": arm.label, "setting": setting(arm)} for arm in group(runs) for run in arm.runs}
    modes = [key for key in rows[0] if key not in FIELDS]
    columns = [*FIELDS, *OF_ROW, *modes, *OF_LAUNCH]
    whole = [row | of_run.get(row["run"], {}) | launched.get(row["run"], {}) for row in rows]
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in whole],
                                     schema=pyarrow.schema([(name, kind(name, modes)) for name in columns]))


def setting(arm: Arm) -> str:
    return sha256(repr(sorted(shared(arm).items())).encode()).hexdigest()[:8]


def kind(name: str, modes: Sequence[str]) -> pyarrow.DataType:
    """The same type whether or not anything was measured."""
    if name in NUMBERS or name in modes:
        return pyarrow.float64()
    return pyarrow.int64() if name in COUNTS else pyarrow.bool_() if name in FLAGS else pyarrow.string()
