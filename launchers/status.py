"""What became of every run: its own files first, squeue second, sacct (or the controller's memory) for jobs that left no word.

    planned     never submitted                  done, collapsed   results, both final
    queued      waits for its turn               failed            ended by itself; the cause is in status.json
    running     with its last sign of life       stopped           at a step boundary, and nobody starts it again
    lost        said to run, but no such job     cancelled         by `launchers cancel` or scancel
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from grpo_routing.files import write_json
from launchers import slurm
from launchers.plan import Entry, SweepPlan
from launchers.settings import CAUSES, LaunchError
from launchers.submissions import Submission, cancelled, ended_by, jobs, launches, submissions

OVER = ("done", "collapsed")
LIVE = ("queued", "running")
STATES = ("done", "collapsed", "running", "queued", "stopped", "failed", "lost", "cancelled", "planned")
CACHE = "queue.json"


@dataclass(frozen=True)
class RunStatus:
    """One line of the table. `left` is in seconds, of training only; `rates` are what the audit measured last."""

    entry: Entry
    state: str
    cause: str
    detail: str
    job: str
    step: int
    hack: float | None
    left: float | None
    silent: float | None  # seconds since the last sign of life of a run that is said to run
    turns: int
    ended: dict[str, int]  # how often by each cause


def state_in(folder: Path) -> str:
    """What the run itself says."""
    said = _json(folder / "status.json")
    return said["state"] if said else "new"


def statuses(plan: SweepPlan) -> tuple[list[RunStatus], str]:
    """A line per run of the plan, and a remark when SLURM did not answer."""
    found = jobs(submissions(plan.root))
    files = {one.folder: _files(plan.folder(one)) for one in plan.entries}
    open_jobs = {found[one.folder][1] for one in plan.entries if one.folder in found and found[one.folder][0].backend == "slurm"
                 and files[one.folder][0]["state"] not in OVER}
    queue, remark = _queue(plan) if open_jobs else ({}, "")
    gone = [] if remark else sorted(job for job in open_jobs if job not in queue)
    ended = {rows[-1]["job"] for _, _, rows in files.values() if rows and rows[-1]["event"] == "end"}
    silent = [job for job in gone if job not in ended]
    try:
        states = slurm.accounts(silent)
    except (OSError, LaunchError) as error:
        states, remark = {}, f"sacct: {error}"
    pool = _pool(plan, found)
    known = None if remark else queue
    return [_status(one, files[one.folder], found.get(one.folder), known, states, pool) for one in plan.entries], remark


def _files(folder: Path) -> tuple[dict, dict | None, list[dict]]:
    return _json(folder / "status.json") or {"state": "new"}, _json(folder / "heartbeat.json"), launches(folder)


def _status(entry: Entry, files: tuple[dict, dict | None, list[dict]], submitted: tuple[Submission, str] | None,
            queue: dict | None, states: dict[str, str], pool: bool) -> RunStatus:
    said, beat, rows = files
    job = submitted[1] if submitted else ""
    started = [row for row in rows if row["event"] == "start"]
    last = next((row for row in reversed(rows) if row["event"] in ("start", "end")), None)
    live = bool(last) and last["event"] == "start"
    cause, detail = (last["cause"], last["detail"]) if last and last["event"] == "end" else ("", "")
    if said["state"] in OVER:
        state, cause, detail = said["state"], "", said.get("cause", "")
    elif submitted and cancelled(rows, submitted[0].created):
        state = "cancelled"
    elif submitted is None:
        state = {"new": "planned", "running": "planned"}.get(said["state"], said["state"])
    elif submitted[0].backend == "slurm":
        state, cause, detail = _on_slurm(job, live, last, cause, detail, queue, states)
    else:
        state, cause, detail = _here(job, live, last, cause, detail, pool)
    step = beat["step"] if beat else 0
    pace = beat["seconds_per_step"] if beat else None
    now = time.time()
    return RunStatus(entry, state, cause, " ".join(detail.split()), job, entry.steps if state == "done" else step,
                     beat["hack"] if beat and "hack" in beat else None,
                     pace * (entry.steps - step) if pace is not None and state == "running" else None,
                     now - max(last["time"], beat["time"] if beat else 0) if state == "running" and last else None,
                     len(started), ended_by(rows))


def _on_slurm(job: str, live: bool, last: dict | None, cause: str, detail: str, queue: dict | None,
              states: dict[str, str]) -> tuple[str, str, str]:
    """State, cause and detail of a run that is not over and whose newest submission went to SLURM."""
    if queue is None:  # SLURM did not answer: what the files say
        return ("running" if live else "queued" if last is None else _ended(cause)), cause, detail
    if job in queue:
        state, reason = queue[job]
        if state in slurm.RUNNING:
            return "running", "", ""
        return "queued", cause, "held; submit again releases it" if reason == "JobHeldUser" else reason
    if last and last["event"] == "end" and last["job"] == job:
        return _ended(cause), cause, detail
    over = states.get(job, "")
    if slurm.CAUSES.get(over) == "cancelled":
        return "cancelled", "cancelled", "by scancel"
    return "lost", slurm.CAUSES.get(over, "crashed"), f"job {job} left no word; SLURM says {over or 'nothing'}"


def _here(job: str, live: bool, last: dict | None, cause: str, detail: str, pool: bool) -> tuple[str, str, str]:
    """The same for this machine's pool."""
    if live:
        if last["host"] != socket.gethostname():
            return "running", "", f"on {last['host']}"
        return ("running", "", "") if _alive(last["pid"], b"launchers.runner") else ("lost", "crashed", "its process is gone")
    if last and last["event"] == "end" and last["job"] == job:
        return ("queued" if pool and cause == "preempted" else _ended(cause)), cause, detail
    return ("queued", cause, "") if pool else ("lost", "crashed", "no pool works on it; submit again")


def _ended(cause: str) -> str:
    return {"preempted": "stopped", "timed_out": "stopped", "held": "stopped", "cancelled": "cancelled"}.get(cause, "failed")


def _alive(pid: int, name: bytes) -> bool:
    try:
        return name in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _pool(plan: SweepPlan, found: dict) -> bool:
    if plan.settings.backend != "local" and all(one.backend != "local" for one, _ in found.values()):
        return False
    from launchers.local import alive

    return alive(plan.root)


def _queue(plan: SweepPlan) -> tuple[dict[str, tuple[str, str]], str]:
    """squeue's answer, asked for at most once per poll_seconds whoever asks; and why there is none."""
    file = plan.root / CACHE
    kept = _json(file)
    if kept and 0 <= time.time() - kept["time"] < plan.settings.poll_seconds:
        return {job: tuple(state) for job, state in kept["jobs"].items()}, ""
    try:
        answer = slurm.queue()
    except LaunchError as error:
        return {}, str(error)
    if os.access(plan.root, os.W_OK):
        try:
            write_json(file, {"time": time.time(), "jobs": answer})
        except OSError:  # a full disk is no reason not to answer
            pass
    return answer, ""


def forget_queue(root: Path) -> None:
    """What we do to the queue makes the kept answer stale."""
    (root / CACHE).unlink(missing_ok=True)


def counts(found: list[RunStatus]) -> str:
    """`3 done, 2 running`, in the order of STATES."""
    seen = Counter(one.state for one in found)
    return ", ".join(f"{seen[state]} {state}" for state in STATES if seen[state]) or "no runs"


def bounded(one: RunStatus, plan: SweepPlan) -> bool:
    """Whether the run ended by a cause that the plan lets it be started again after."""
    return one.cause in CAUSES and one.ended.get(one.cause, 0) <= getattr(plan.settings.retries, one.cause)


def _json(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
