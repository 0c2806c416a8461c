"""What was handed over, and what became of it: submissions/<name>.json of a sweep, launches.jsonl of every run.

A submission is written down before sbatch is asked, under a name that its jobs bear, and again with the job's number; the jobs are
held until then. So whoever is killed in between leaves either a job that its name leads back to, or none.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from grpo_routing.files import Record, write_json


@dataclass(frozen=True)
class Submission:
    """One array of runs, in the order of their indices. `job` is None until SLURM has given a number."""

    name: str
    created: float
    backend: str
    job: str | None
    released: bool  # the jobs may start
    runs: list[str]
    resources: dict

    def task(self, index: int) -> str:
        """How SLURM calls the job of a run; a lone run is no array."""
        return f"{self.job}" if len(self.runs) == 1 else f"{self.job}_{index}"

    def save(self, root: Path) -> None:
        write_json(root / "submissions" / f"{self.name}.json", asdict(self))

    def with_job(self, job: str) -> Submission:
        return replace(self, job=job)


def new_submission(root: Path, backend: str, runs: list[str], resources: dict) -> Submission:
    made = time.time()
    name = f"{root.resolve().name}-{time.strftime('%m%d-%H%M%S', time.localtime(made))}-{secrets.token_hex(3)}"
    return Submission(name, made, backend, None, False, runs, resources)


def submissions(root: Path) -> list[Submission]:
    """All of a sweep, oldest first."""
    found = [Submission(**json.loads(file.read_text(encoding="utf-8"))) for file in (root / "submissions").glob("[!.]*.json")]
    return sorted(found, key=lambda one: one.created)


def jobs(found: list[Submission]) -> dict[str, tuple[Submission, str]]:
    """Run -> its newest submission and the job in it."""
    return {run: (one, one.task(index)) for one in found for index, run in enumerate(one.runs)}


# ------------------------------------------------------------------------------------------------ one run's own record


def note(folder: Path, event: str, **facts: object) -> None:
    """Add a row to the run's launches.jsonl: start, end, cancel, forgive. Half a row, of a full disk, is taken away first."""
    file = folder / "launches.jsonl"
    whole = file.read_bytes() if file.exists() else b""
    if whole and not whole.endswith(b"\n"):
        os.truncate(file, whole.rfind(b"\n") + 1)
    Record(file).append([{"event": event, "time": time.time(), **facts}])


def launches(folder: Path) -> list[dict]:
    return Record(folder / "launches.jsonl").rows()


def cancelled(rows: list[dict], since: float) -> bool:
    """Whether someone cancelled the run after `since`, the time that it was submitted."""
    return any(row["event"] == "cancel" and row["time"] > since for row in rows)


def ended_by(rows: list[dict]) -> dict[str, int]:
    """How often the run ended by each cause since it was last forgiven. A start without an end is the next start's to judge."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["event"] == "forgive":
            counts = {}
        elif row["event"] == "end":
            counts[row["cause"]] = counts.get(row["cause"], 0) + 1
    return counts
