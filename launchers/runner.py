"""One run on one machine: starts its workers, passes signals on, writes down how it ended and asks for another turn.

It is a process of its own, without torch, so that it outlives a worker that the kernel kills. SIGTERM, SIGUSR1 and SIGUSR2 are
passed to the worker, which stops at its next step boundary with a checkpoint. Why the signal came is decided here, from the
remaining wall time and the job's state (submitit's rule calls every signal of a short job a time-out).

    python -m launchers.runner outputs/<experiment>/runs/<run>
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from grpo_routing.files import write_json
from launchers import slurm
from launchers.plan import SweepPlan, read_plan
from launchers.settings import LaunchError
from launchers.submissions import cancelled, ended_by, launches, note
from launchers.workers import Workers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
KEPT = 40  # last lines of output that status.json keeps
SLACK = 60  # seconds that SLURM's warning may come before it was asked for
STOPPED, HELD, NO_FILES = 143, 75, 74  # exit codes: at a step boundary; another process has the run; the folder cannot be written
OVER = ("done", "collapsed")
MEMORY_WORDS = ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
DISK_WORDS = ("No space left on device", "Read-only file system", "Disk quota exceeded")


def execute(folder: Path) -> int:
    """Run to the end of this turn; returns the exit code for SLURM."""
    try:
        return _execute(folder, read_plan(folder.parent.parent))
    except OSError as error:
        print(f"{folder} cannot be written: {error}. Nothing that was saved is lost: the run goes on from its last checkpoint. Make "
              f"room, or the folder writable, then: python -m launchers retry {folder.parent.parent}", file=sys.stderr, flush=True)
        return NO_FILES


def _execute(folder: Path, plan: SweepPlan) -> int:
    job = os.environ.get("LAUNCHERS_JOB") or _slurm_job()
    asked: list[int] = []
    started: list[Workers] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for workers in started:
            workers.pass_on(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    rows = launches(folder)
    if rows and rows[-1]["event"] == "start":  # its end was never written: killed without notice
        note(folder, "end", job=rows[-1]["job"], exit=None, cause=_killed_by(rows[-1]), detail="killed without notice")
    note(folder, "start", job=job, host=socket.gethostname(), pid=os.getpid(), restart=os.environ.get("SLURM_RESTART_COUNT", "0"))
    turn = sum(row["event"] == "start" for row in rows) + 1
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the worker, which lets them in when it can stop
    workers = Workers([plan.code["python"], "-m", "grpo_routing.worker", str(folder)], plan.code["cwd"],
                      os.environ | {"PYTHONPATH": _path(plan.code["folder"])}, int(os.environ.get("LAUNCHERS_PROCESSES", "1")))
    started.append(workers)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in asked:
        workers.pass_on(number)
    lines = _follow(workers, folder / "attempts" / f"{turn:03d}.log")
    return _ended(plan, folder, job, workers.wait(), asked, lines)


def _ended(plan: SweepPlan, folder: Path, job: str, code: int, asked: list[int], lines: list[str]) -> int:
    """Write down how the worker ended; ask SLURM for another turn when it was only interrupted."""
    if code == 0:
        note(folder, "end", job=job, exit=0, cause="finished", detail="")
        return 0
    if code == HELD:
        note(folder, "end", job=job, exit=code, cause="held", detail=lines[-1] if lines else "")
        return code
    if code != STOPPED or not asked:
        cause, detail = failure(folder, code, lines)
        note(folder, "end", job=job, exit=code, cause=cause, detail=detail)
        return code
    slurm_job = os.environ.get("SLURM_JOB_ID")
    now = slurm.state_now(slurm_job) if slurm_job else ""
    begun = next(row["time"] for row in reversed(launches(folder)) if row["event"] == "start")
    cause = "cancelled" if cancelled(launches(folder), begun) else why_stopped(plan, slurm_job, now)
    note(folder, "end", job=job, exit=code, cause=cause, detail=f"stopped at a step boundary after {signal.Signals(asked[0]).name}")
    used, allowed = ended_by(launches(folder)).get(cause, 0), getattr(plan.settings.retries, cause, 0)
    if slurm_job and cause != "cancelled":
        if used > allowed:
            print(f"{folder}: {cause} {used} times, and launcher.retries.{cause} is {allowed}; not started again. "
                  f"python -m launchers retry {plan.root} does", file=sys.stderr, flush=True)
            return STOPPED
        if now in ("RUNNING", "TIMEOUT"):  # a preempted job is requeued by SLURM itself
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # everything is written: SLURM may end us at once
            subprocess.run(["scontrol", "requeue", slurm_job], timeout=slurm.TIMEOUT)
            time.sleep(30)  # which it does; an exit now could still be taken for the job's own
    return STOPPED


def why_stopped(plan: SweepPlan, job: str | None, state: str) -> str:
    """cancelled, timed_out or preempted: from the job's state and the wall time that is left."""
    if state == "CANCELLED":
        return "cancelled"
    left = slurm.seconds_left(job) if job else None
    return "timed_out" if state == "TIMEOUT" or (left is not None and left < plan.settings.signal_seconds + SLACK
                                                 and state != "PREEMPTED") else "preempted"


def failure(folder: Path, code: int, lines: list[str]) -> tuple[str, str]:
    """Cause and one line of a worker that failed; status.json gets the last lines, and an error where the worker left none."""
    file = folder / "status.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"state": "new"}
    if said["state"] != "failed":
        name = signal.Signals(code - 128).name if code > 128 and code - 128 in list(signal.Signals) else None
        said |= {"state": "failed", "error": f"the worker was ended by {name}" if name else f"the worker ended with exit code {code}"}
    text = said["error"] + "\n" + "\n".join(lines)
    memory = any(word in text for word in MEMORY_WORDS) or (code == 137 and _killed_for_memory())
    if code == 137 and not memory:
        said["error"] += ", which is often the kernel short of memory, or someone's kill -9"
    if any(word in text for word in DISK_WORDS):
        said["error"] += f". {folder} cannot be written; make room and retry: it goes on from its last checkpoint"
    write_json(file, said | {"updated": time.time(), "exit": code, "last_lines": lines})
    return "out_of_memory" if memory else "crashed", said["error"].splitlines()[0]


def _follow(workers: Workers, log: Path) -> list[str]:
    """Copy the workers' output to its log and ours; returns the last lines. A full disk costs the log, not the lines."""
    kept: deque[str] = deque(maxlen=KEPT)

    def copy() -> None:
        try:
            log.parent.mkdir(exist_ok=True)
            handle = log.open("a", encoding="utf-8")
        except OSError:
            handle = None
        for raw in workers.output:
            line = raw.decode(errors="replace")
            kept.append(line.rstrip("\n"))
            for to in (handle, sys.stdout):
                try:
                    if to:
                        to.write(line)
                        to.flush()
                except OSError:
                    handle = None if to is handle else handle

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    while reader.is_alive():
        reader.join(0.5)  # short, so that the main thread hears signals
        workers.tend()
    return list(kept)


def _killed_by(start: dict) -> str:
    """Why a turn that left no word ended: this is a restart of the same job, or SLURM remembers."""
    if start["job"] == _slurm_job() and start["job"]:
        return "node_lost" if start["host"] != socket.gethostname() else "preempted"
    state = slurm.accounts([start["job"]]).get(start["job"], "") if os.environ.get("SLURM_JOB_ID") else ""
    return slurm.CAUSES.get(state, "crashed")


def _killed_for_memory() -> bool:
    """Whether the kernel says that it killed something of this control group for memory."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        events = Path("/sys/fs/cgroup" + own, "memory.events").read_text()
    except OSError:
        return False
    return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in events.splitlines())


def _slurm_job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def _path(code: str) -> str:
    return os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    try:
        sys.exit(execute(Path(sys.argv[1])))
    except LaunchError as refused:
        sys.exit(f"{refused}")
