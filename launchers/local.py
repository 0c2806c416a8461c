"""This machine as a cluster of its own: one process per run, a few at a time, each with its own GPUs.

A pool process of its own session works through the submissions of a sweep, so whoever submitted may leave. A second pool of the
same sweep waits until the first has finished, and then finds what is left.

    python -m launchers.local outputs/<experiment>
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from grpo_routing.files import Held, claimed
from launchers.plan import SweepPlan, read_plan
from launchers.runner import OVER, SIGNALS, STOPPED
from launchers.settings import Local, LocalResources
from launchers.status import state_in
from launchers.submissions import Submission, cancelled, ended_by, jobs, launches, new_submission, submissions

LOCK = ".pool.lock"
LOOK = 0.2  # seconds between looks at the pool's own processes


def submit(plan: SweepPlan, names: list[str], resources: LocalResources) -> Submission:
    """Write the runs down; a pool takes them from there (start_pool)."""
    made = new_submission(plan.root, "local", names, resources.__dict__)
    made = replace(made, job=made.name, released=True)
    made.save(plan.root)
    return made


def start_pool(plan: SweepPlan) -> None:
    with open(plan.root / "pool.log", "a", encoding="utf-8") as log:
        pool = subprocess.Popen([plan.code["python"], "-m", "launchers.local", str(plan.root.resolve())], cwd=plan.code["cwd"],
                                start_new_session=True, env=os.environ | {"PYTHONPATH": _path(plan)}, stdin=subprocess.DEVNULL,
                                stdout=log, stderr=log)
    while not alive(plan.root) and pool.poll() is None:  # until it has the sweep, the runs would look lost
        time.sleep(LOOK)


def alive(root: Path) -> bool:
    """Whether a pool holds the sweep."""
    try:
        with claimed(root / LOCK, patience=0):
            return False
    except Held:
        return True


def work(root: Path) -> None:
    """Run what was submitted, until nothing is left or someone ends us: then the runs are stopped at a step boundary."""
    asked: list[int] = []
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    with claimed(root / LOCK, patience=None):
        running: dict[tuple[str, str], tuple[subprocess.Popen, list[int]]] = {}
        tried: set[tuple[str, str]] = set()
        plan = read_plan(root)
        while True:
            for key, (process, _) in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    if process.returncode == STOPPED and not asked and _again(plan, key[0]):
                        tried.discard(key)
            if asked:
                for process, _ in running.values():
                    process.send_signal(signal.SIGTERM)
                for process, _ in running.values():
                    process.wait()
                return
            if len(running) < plan.settings.parallel:  # a full pool reads no files: it would take the time of its runs
                plan = read_plan(root)
                settings: Local = plan.settings
                waiting = next(((run, job, one) for run, (one, job) in jobs(submissions(root)).items()
                                if one.backend == "local" and (run, job) not in tried and _wants(plan, run, job, one)), None)
                free = [gpu for gpu in settings.gpus if all(gpu not in taken for _, taken in running.values())]
                if waiting and len(free) >= waiting[2].resources["gpus"]:
                    run, job, one = waiting
                    taken = free[: one.resources["gpus"]]
                    tried.add((run, job))
                    running[run, job] = (_start(plan, run, job, taken), taken)
                    continue
                if not waiting and not running:
                    return
            time.sleep(LOOK)


def _wants(plan: SweepPlan, run: str, job: str, one: Submission) -> bool:
    """Whether the run has still to be started in this submission: not over, not cancelled, not ended in it by another pool."""
    if state_in(plan.root / "runs" / run) in OVER:
        return False
    rows, since = launches(plan.root / "runs" / run), one.created
    mine = [row for row in rows if row["event"] in ("start", "end") and row["job"] == job]
    return not cancelled(rows, since) and not (mine and mine[-1]["event"] == "end" and mine[-1]["exit"] != STOPPED)


def _again(plan: SweepPlan, run: str) -> bool:
    """Whether a stopped run gets another turn by itself."""
    rows, since = launches(plan.root / "runs" / run), jobs(submissions(plan.root))[run][0].created
    return not cancelled(rows, since) and ended_by(rows).get("preempted", 0) <= plan.settings.retries.preempted


def _start(plan: SweepPlan, run: str, job: str, gpus: list[int]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": _path(plan), "LAUNCHERS_JOB": job, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                                "LAUNCHERS_PROCESSES": str(max(1, len(gpus)))}
    return subprocess.Popen([plan.code["python"], "-m", "launchers.runner", str(plan.root / "runs" / run)], cwd=plan.code["cwd"],
                            env=environment, stdin=subprocess.DEVNULL)


def _path(plan: SweepPlan) -> str:
    return os.pathsep.join([plan.code["folder"], *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
