"""SLURM: submitit carries the jobs there; squeue, and sacct or scontrol where they answer, say what became of them.

The pickle that submitit stores holds a run folder's path and no state, so a job that is requeued starts from the run's newest
checkpoint. submitit's own judgement of signals is not used: the runner has its handlers (runner.py).
"""

from __future__ import annotations

import getpass
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.settings import LaunchError, Slurm, SlurmResources
from launchers.submissions import Submission, new_submission, submissions

if TYPE_CHECKING:
    from launchers.plan import SweepPlan

TIMEOUT = 60  # seconds that a SLURM command may take
STARTS_BY_SUBMITIT = 100_000  # submitit counts time-outs its own way; runner.py counts them ours
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
CAUSES = {"PREEMPTED": "preempted", "TIMEOUT": "timed_out", "DEADLINE": "timed_out", "NODE_FAIL": "node_lost", "BOOT_FAIL": "node_lost",
          "OUT_OF_MEMORY": "out_of_memory", "CANCELLED": "cancelled", "REVOKED": "cancelled"}  # the rest: crashed


@dataclass(frozen=True)
class Payload:
    """What submitit pickles: where the run lies, nothing else."""

    folder: str

    def __call__(self) -> None:
        from launchers.runner import execute

        sys.exit(execute(Path(self.folder)))  # not an exception: submitit would log one and SLURM see exit code 1 for every cause

    def checkpoint(self) -> object:
        """For a signal before the runner has its handlers: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(plan: SweepPlan, names: list[str], resources: SlurmResources, limit: int, share: float) -> list[Submission]:
    """Hand runs of one kind of resources to SLURM, `limit` per array; `share` is their part of settings.parallel. Raises LaunchError."""
    count = math.ceil(len(names) / limit)
    parallel = max(1, int(plan.settings.parallel * share / count))
    return [_submit_array(plan, names[at : at + limit], resources, parallel) for at in range(0, len(names), limit)]


def _submit_array(plan: SweepPlan, names: list[str], resources: SlurmResources, parallel: int) -> Submission:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    made = new_submission(plan.root, "slurm", names, resources.__dict__)
    made.save(plan.root)
    executor = SlurmExecutor(plan.root / "slurm", max_num_timeout=STARTS_BY_SUBMITIT, python=plan.code["python"])
    executor.update_parameters(**parameters(plan, made.name, resources, parallel))
    payloads = [Payload(str((plan.root / "runs" / name).resolve())) for name in names]
    try:
        handed = executor.map_array(Payload.__call__, payloads) if len(payloads) > 1 else [executor.submit(payloads[0])]
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        (plan.root / "submissions" / f"{made.name}.json").unlink()
        raise LaunchError(f"sbatch refused {len(names)} runs:\n{error}\nNothing of this array was submitted; what was before it is in "
                          f"{plan.root / 'submissions'}. Mend the request and submit again: only what is missing goes") from error
    made = made.with_job(handed[0].job_id.partition("_")[0])
    made.save(plan.root)
    return release(plan.root, made)


def parameters(plan: SweepPlan, name: str, resources: SlurmResources, parallel: int) -> dict:
    """submitit's words for what the plan asks for."""
    settings: Slurm = plan.settings
    home = plan.code["folder"]
    setup = [f"cd {shlex.quote(plan.code['cwd'])}", f"export PYTHONPATH={shlex.quote(home)}${{PYTHONPATH:+:$PYTHONPATH}}",
             f"export LAUNCHERS_PROCESSES={processes(resources)}", *settings.setup]
    optional = {"partition": resources.partition, "account": resources.account, "qos": resources.qos, "gres": resources.gres,
                "constraint": resources.constraint, "mail_user": resources.mail_user, "mail_type": resources.mail_type,
                "gpus_per_node": resources.gpus or None,
                "mem": f"{int(resources.memory_gb * 1024)}MB" if resources.memory_gb is not None else None}
    return {"job_name": name, "time": resources.minutes, "cpus_per_task": resources.cpus, "nodes": 1, "ntasks_per_node": 1,
            "signal_delay_s": settings.signal_seconds, "array_parallelism": parallel, "setup": setup, "stderr_to_stdout": True,
            "additional_parameters": {"requeue": True, "hold": True, **settings.sbatch}, "wckey": None,
            **{key: value for key, value in optional.items() if value is not None}}


def processes(resources: SlurmResources) -> int:
    """How many the runner starts for one run: one per GPU, also where a site names them in gres."""
    found = re.search(r"\bgpu(?::[A-Za-z][^:,]*)?(?::(\d+))?", resources.gres or "")
    return max(1, resources.gpus, int(found[1] or 1) if found else 0)


def release(root: Path, made: Submission) -> Submission:
    """Let the jobs start, now that their number is written down."""
    command("scontrol", "release", made.job)
    made = replace(made, released=True)
    made.save(root)
    return made


def recover(root: Path) -> list[str]:
    """Finish what a killed `submit` left half done. Jobs without a record are cancelled, since nobody knows which runs they hold;
    records without a job are removed. Returns what was done."""
    said = []
    for one in submissions(root):
        if one.backend != "slurm" or one.released:
            continue
        if one.job is not None:
            release(root, one)
            said.append(f"released {one.name}, which an earlier submit had left held")
            continue
        found = command("squeue", "-h", "-n", one.name, "-o", "%A").split()
        for job in sorted(set(found)):
            command("scancel", job)
        (root / "submissions" / f"{one.name}.json").unlink()
        said.append(f"dropped {one.name}, whose submission had been cut short ({len(found)} held jobs cancelled)")
    return said


def array_limit(settings: Slurm) -> int:
    """Runs that one array may have: the configured number, or the site's."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", command("scontrol", "show", "config"))
    site = int(found[1]) if found else 1
    if site <= 1:
        return 1  # arrays are switched off: a job per run
    return min(site, settings.max_array or site)


# ------------------------------------------------------------------------------------------------ what SLURM knows


def queue() -> dict[str, tuple[str, str]]:
    """Job -> (state, reason) of all of the user's jobs that are not over. Raises LaunchError when squeue does not answer."""
    rows = command("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i|%T|%r").splitlines()
    return {job: (state, reason) for job, state, reason in (row.split("|", 2) for row in rows)}


def accounts(wanted: list[str]) -> dict[str, str]:
    """Job -> state of jobs that are over: from sacct where there is accounting, else from the controller's short memory."""
    if not wanted:
        return {}
    if shutil.which("sacct"):
        ids = ",".join(sorted({job.partition("_")[0] for job in wanted}))
        done = subprocess.run(["sacct", "-n", "-P", "-X", "-j", ids, "-o", "JobID,State"], capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode == 0:
            return {job: state.split()[0] for job, _, state in (row.partition("|") for row in done.stdout.splitlines()) if state}
    done = subprocess.run(["scontrol", "-o", "show", "jobs"], capture_output=True, text=True, timeout=TIMEOUT)
    return dict(job_state(line) for line in done.stdout.splitlines() if "JobId=" in line)


def job_state(line: str) -> tuple[str, str]:
    """Number and state from a line of `scontrol -o show job`."""
    facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
    array = facts.get("ArrayJobId")
    return (f"{array}_{facts['ArrayTaskId']}" if array else facts["JobId"]), facts["JobState"]


def state_now(job: str) -> str:
    """State of the job that asks; empty when SLURM does not say."""
    done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=TIMEOUT)
    lines = [line for line in done.stdout.splitlines() if "JobId=" in line]
    return underneath(lines[0], int(os.environ.get("SLURM_RESTART_COUNT", "0"))) if lines else ""


def underneath(line: str, restarts: int) -> str:
    """The state of a job of so many restarts. While its processes end SLURM says COMPLETING, whatever ended it: one restart more means
    that it is in the queue again, the time limit is named as the reason, and what is left is scancel."""
    facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
    if facts["JobState"] not in ("COMPLETING", "PENDING"):
        return facts["JobState"]
    if int(facts["Restarts"]) > restarts or facts["JobState"] == "PENDING":
        return "PREEMPTED"
    return "TIMEOUT" if facts["Reason"] == "TimeLimit" else "CANCELLED"


def seconds_left(job: str) -> float | None:
    """Until the job's time limit, by the clock that SLURM ends it with; None when it does not say."""
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end) - time.time()
    done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=TIMEOUT)
    words = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", done.stdout.strip())
    if not words:
        return None
    days, hours, minutes, seconds = (int(word or 0) for word in words.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def cancel(wanted: list[str]) -> None:
    for at in range(0, len(wanted), 200):  # command lines have an end
        command("scancel", *wanted[at : at + 200])


def command(*words: str) -> str:
    """Output of a SLURM command. Raises LaunchError with its own message."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError as error:
        raise LaunchError(f"{words[0]} is not on this machine; expected SLURM's commands. Log in where they are, or use "
                          "hydra/launcher=local") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{' '.join(words[:2])} did not answer within {TIMEOUT} s; try again later, nothing was lost") from error
    if done.returncode:
        raise LaunchError(f"{' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
