"""What the verbs do; the Hydra plugin and `python -m launchers` call the same functions."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from grpo_routing.files import claimed
from launchers import local, slurm
from launchers.plan import Entry, SweepPlan, hours
from launchers.settings import LaunchError
from launchers.status import LIVE, OVER, RunStatus, bounded, counts, forget_queue, statuses
from launchers.submissions import Submission, jobs, launches, note, submissions

Say = Callable[[str], None]


def submit(plan: SweepPlan, names: list[str], changes: dict, say: Say) -> list[Submission]:
    """Hand over every run that is neither finished nor under way and never failed by itself. Raises LaunchError."""
    with claimed(plan.root / ".submit.lock", patience=None):
        _recover(plan, say)
        chosen = {one.folder for one in plan.chosen(names)}
        found, _ = _asked(plan)
        wanted = [one.entry for one in found if one.entry.folder in chosen and (one.state in ("planned", "stopped", "cancelled")
                                                                               or (one.state == "lost" and bounded(one, plan)))]
        left = [one for one in found if one.entry.folder in chosen and one.state in ("failed", "lost") and one.entry not in wanted]
        if left:
            say(f"{len(left)} failed or lost runs are left alone; python -m launchers retry {plan.root} starts them again")
        return _hand_over(plan, wanted, changes, say)


def retry(plan: SweepPlan, names: list[str], changes: dict, anyway: bool, say: Say) -> list[Submission]:
    """Start failed, lost and stopped runs again, as often as launcher.retries lets their cause; `anyway` forgives what was."""
    with claimed(plan.root / ".submit.lock", patience=None):
        _recover(plan, say)
        chosen = {one.folder for one in plan.chosen(names)}
        found, _ = _asked(plan)
        ended = [one for one in found if one.entry.folder in chosen and one.state in ("failed", "lost", "stopped")]
        wanted = [one for one in ended if anyway or bounded(one, plan)]
        for one in ended:
            if one not in wanted:
                allowed = getattr(plan.settings.retries, one.cause, 0)
                say(f"{one.entry.folder}: {one.cause} {one.ended.get(one.cause, 0)} times and launcher.retries.{one.cause} is {allowed}; "
                    f"left alone (--anyway starts it): {one.detail}")
        for one in wanted:
            if anyway:
                note(plan.folder(one.entry), "forgive")
        return _hand_over(plan, [one.entry for one in wanted], changes, say)


def cancel(plan: SweepPlan, names: list[str], say: Say) -> int:
    """End queued and running runs; they keep their checkpoints and `submit` takes them up again. Returns how many."""
    chosen = {one.folder for one in plan.chosen(names)}
    found, _ = _asked(plan)
    live = [one for one in found if one.entry.folder in chosen and one.state in LIVE]
    for one in live:
        note(plan.folder(one.entry), "cancel", job=one.job)
    where = jobs(submissions(plan.root))
    slurm_jobs = [one.job for one in live if where[one.entry.folder][0].backend == "slurm"]
    if slurm_jobs:
        slurm.cancel(slurm_jobs)
        forget_queue(plan.root)
    for one in live:
        if one.job not in slurm_jobs and one.state == "running":
            start = next(row for row in reversed(launches(plan.folder(one.entry))) if row["event"] == "start")
            os.kill(start["pid"], signal.SIGTERM)
    say(f"{len(live)} runs cancelled; python -m launchers submit {plan.root} takes them up from their checkpoints")
    return len(live)


def summary(plan: SweepPlan, entries: list[Entry], changes: dict) -> str:
    """The number of runs, and the hours that they ask for at most."""
    if not entries:
        return "nothing to submit"
    wall, gpu = hours(plan, entries, changes)
    return f"{len(entries)} runs, at most {wall:.1f} hours" + (f" ({gpu:.1f} GPU hours)" if gpu else "") + " requested"


def _asked(plan: SweepPlan) -> tuple[list[RunStatus], str]:
    """Statuses of this very moment. Raises LaunchError when SLURM does not answer: a run might go twice."""
    forget_queue(plan.root)
    found, remark = statuses(plan)
    if remark:
        raise LaunchError(f"SLURM did not say which runs are under way, so nothing was started or ended: {remark}")
    return found, remark


def _recover(plan: SweepPlan, say: Say) -> None:
    if plan.settings.backend == "slurm":
        for line in slurm.recover(plan.root):
            say(line)


def _hand_over(plan: SweepPlan, entries: list[Entry], changes: dict, say: Say) -> list[Submission]:
    """Submit in groups of equal resources; what was handed over before an error stays handed over."""
    say(summary(plan, entries, changes))
    if not entries:
        return []
    groups: dict[str, list[Entry]] = defaultdict(list)
    for one in entries:
        groups[json.dumps(asdict(plan.resources(one, changes)), sort_keys=True)].append(one)
    made: list[Submission] = []
    limit = slurm.array_limit(plan.settings) if plan.settings.backend == "slurm" else len(entries)
    try:
        for group in groups.values():
            resources, names = plan.resources(group[0], changes), [one.folder for one in group]
            if plan.settings.backend == "slurm":
                made += slurm.submit(plan, names, resources, limit, len(group) / len(entries))
            else:
                made.append(local.submit(plan, names, resources))
    finally:
        forget_queue(plan.root)
        for one in made:
            say(f"submitted {len(one.runs)} runs as {one.job}")
    if plan.settings.backend == "local":
        local.start_pool(plan)
    return made


def finished(found: list[RunStatus]) -> bool:
    return all(one.state not in LIVE for one in found)


def verdict(plan: SweepPlan, found: list[RunStatus]) -> tuple[str, bool]:
    """Closing line of a sweep and whether every run has its result."""
    good = all(one.state in OVER for one in found)
    more = "" if good else f"; python -m launchers status {plan.root} says why, retry starts them again"
    return f"{plan.root}: {counts(found)}{more}", good


def folder_of(word: str) -> Path:
    """A sweep folder as given, or the one that a run folder in it belongs to."""
    path = Path(word)
    return path.parent.parent if (path / "config.yaml").exists() and not (path / "plan.json").exists() else path
