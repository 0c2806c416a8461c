"""plan.json: which runs a sweep has, what each asks for, and which code they were planned with. Written before anything starts.

    outputs/<experiment>/plan.json                  this file
    outputs/<experiment>/runs/<run>/config.yaml     frozen; all that a worker reads
    outputs/<experiment>/submissions/<name>.json    what was handed to SLURM or to this machine (submissions.py)

A plan grows: planning the same runs again changes nothing, further runs are added. A run is never changed or dropped silently:
its folder's name is the hash of its config.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_routing.files import claimed, write_json
from launchers.settings import LaunchError, Resources, Settings, changed, settings_of

VERSION = 1
HISTORY = 20  # code states that a plan remembers; one per time that it was made or grew


@dataclass(frozen=True)
class Entry:
    """One run of a plan. `resources` is what it asks for; `folder` is its name below runs/."""

    folder: str
    arm: str
    loophole: str
    seed: int
    steps: int
    resources: dict


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it lies in its folder."""

    root: Path
    code: dict  # folder, python, cwd: how a worker is started
    history: list[dict]  # when it was planned or grew, from which commit, and the hash of what was not committed
    settings: Settings
    entries: list[Entry]

    def folder(self, entry: Entry) -> Path:
        return self.root / "runs" / entry.folder

    def resources(self, entry: Entry, changes: dict) -> Resources:
        """What the run asks for, with what a command line changes this once."""
        return changed(changed(self.settings.resources, entry.resources, entry.folder), changes, "this submission")

    def chosen(self, names: list[str]) -> list[Entry]:
        """Entries whose folder, arm or loophole is named; all of them without a name. Raises LaunchError for an unknown one."""
        known = {word for one in self.entries for word in (one.folder, one.arm, one.loophole)}
        if unknown := [name for name in names if name not in known]:
            raise LaunchError(f"the plan in {self.root} has no run, arm or loophole {', '.join(unknown)}; "
                              f"its arms are {', '.join(sorted({one.arm for one in self.entries}))}")
        return [one for one in self.entries if not names or {one.folder, one.arm, one.loophole} & set(names)]


def read_plan(root: Path) -> SweepPlan:
    """The plan of a sweep folder. Raises LaunchError when there is none that this code can read."""
    file = root / "plan.json"
    if not file.exists():
        raise LaunchError(f"expected a planned sweep in {root}, but it has no plan.json. Plan one: "
                          f"python -m launchers plan {root} experiment=<name>")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LaunchError(f"expected JSON in {file}, but {error}. Plan the sweep again: it finds its runs") from error
    if said["version"] != VERSION:
        raise LaunchError(f"{file} has version {said['version']}; this code reads version {VERSION}. Use the code that planned it")
    return SweepPlan(root, said["code"], said["history"], settings_of(said["settings"]), [Entry(**one) for one in said["runs"]])


def write_plan(plan: SweepPlan) -> None:
    write_json(plan.root / "plan.json", {"version": VERSION, "code": plan.code, "history": plan.history[-HISTORY:],
                                         "settings": asdict(plan.settings), "runs": [asdict(one) for one in plan.entries]})


def extend(plan: SweepPlan) -> tuple[SweepPlan, int]:
    """Write the plan, or add its runs to the one that is there. Returns the whole and how many runs are new."""
    with claimed(plan.root / ".plan.lock", patience=None):
        if not (plan.root / "plan.json").exists():
            write_plan(plan)
            return plan, len(plan.entries)
        old = read_plan(plan.root)
        there = {one.folder for one in old.entries}
        new = [one for one in plan.entries if one.folder not in there]
        if new or plan.settings != old.settings or plan.code != old.code:
            changed_now = {one.folder: one for one in plan.entries}
            entries = [changed_now.get(one.folder, one) for one in old.entries] + new  # asked for again: with today's resources
            plan = SweepPlan(plan.root, plan.code, [*old.history, *plan.history], plan.settings, entries)
            write_plan(plan)
            return plan, len(new)
    return old, 0


def gaps(entries: list[Entry]) -> list[str]:
    """Seeds that one arm x loophole lacks and another has; comparing them would mix seed counts."""
    cells = {(one.arm, one.loophole) for one in entries}
    have = Counter((one.arm, one.loophole, one.seed) for one in entries)
    seeds = sorted({one.seed for one in entries})
    return [f"gap: {arm} on {loophole} has no seed {', '.join(map(str, lacks))}, which another arm has; add it, or set "
            f"hydra.launcher.gaps=allow" for arm, loophole in sorted(cells)
            if (lacks := [seed for seed in seeds if not have[arm, loophole, seed]])]


def hours(plan: SweepPlan, entries: list[Entry], changes: dict) -> tuple[float, float]:
    """Hours and GPU hours that these runs ask for, at most."""
    asked = [plan.resources(one, changes) for one in entries]
    return sum(one.minutes for one in asked) / 60, sum(one.minutes * one.gpus for one in asked) / 60
