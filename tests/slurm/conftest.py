"""A real SLURM cluster on this machine, and sweeps through it from a copy of the code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tests" / "slurm" / "local_cluster.sh"
LIMIT = 7  # MaxArraySize of the cluster
PATIENCE = 240  # seconds until something that must happen counts as not happening; the machine may be busy
TINY = ["model=tiny_random", "trainer=smoke", "evaluation=smoke", "loophole=held_out"]
SMALL = {"minutes": 10, "cpus": 1, "gpus": 0, "memory_gb": "null"}


@dataclass(frozen=True)
class Cluster:
    """The cluster, and the copy of the code that sweeps start from."""

    environment: dict[str, str]
    code: Path
    cache: Path

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(words, cwd=self.code, env=self.environment, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", *words, check=check)

    def words(self, root: Path, *more: str) -> list[str]:
        """The Hydra route's words for a sweep in `root`."""
        resources = [f"hydra.launcher.resources.{key}={value}" for key, value in SMALL.items()]
        return ["grpo_routing", "-m", "hydra/launcher=slurm", *resources, "hydra.launcher.poll_seconds=1",
                "hydra.launcher.signal_seconds=5", "hydra.launcher.wait=false",
                "hydra.launcher.parallel=2", f"hydra.sweep.dir={root.parent}/hydra",
                "hydra.sweeper.controls=none", f"output={root.parent}", f"experiment_name={root.name}", f"cache={self.cache}", *more]

    def sweep(self, root: Path, *more: str) -> subprocess.CompletedProcess:
        return self.python(*self.words(root, *TINY, *more))

    def launchers(self, *words: object, check: bool = True) -> subprocess.CompletedProcess:
        return self.python("launchers", *map(str, words), check=check)

    def finish(self, root: Path) -> str:
        """Watch until nothing is queued or running, and no runner has an end to write down yet; returns what was shown."""
        shown = self.launchers("watch", root, check=False).stdout
        for run in (root / "runs").iterdir():
            causes(run)
        return shown

    def signal(self, name: str, job: str, run: Path) -> None:
        """One signal, and wait for the turn to end. scancel hears `try again later` though the signal went out, and would repeat it."""
        asked = subprocess.Popen(["scancel", f"--signal={name}", job], env=self.environment, stderr=subprocess.PIPE)
        until(lambda: rows(run / "launches.jsonl")[-1]["event"] == "end", f"the end of a turn after SIG{name}")
        asked.kill()
        asked.communicate()

    def state(self, job: str) -> str:
        """SLURM's own word for a job."""
        said = self.run("scontrol", "-o", "show", "job", job).stdout.splitlines()
        facts = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in said]
        return next(one["JobState"] for one in facts if job in (one["JobId"], f"{one.get('ArrayJobId')}_{one.get('ArrayTaskId')}"))


def folder(root: Path, name: str) -> Path:
    (found,) = (root / "runs").glob(f"{name}-*")
    return found


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def starts(run: Path) -> list[dict]:
    return [row for row in rows(run / "launches.jsonl") if row["event"] == "start"]


def causes(run: Path) -> list[str]:
    """How its turns ended. The runner writes that a moment after the worker has written the run's own state."""
    deadline = time.monotonic() + 30
    while [row["event"] for row in rows(run / "launches.jsonl")[-1:]] == ["start"] and time.monotonic() < deadline:
        time.sleep(0.2)
    return [row["cause"] for row in rows(run / "launches.jsonl") if row["event"] == "end"]


def until(happened: Callable[[], object], what: str) -> object:
    """The first true answer. Fails when there is none within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if answer := happened():
            return answer
        time.sleep(0.2)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


def at_step(run: Path, step: int) -> None:
    there = run / "checkpoints" / "latest"
    until(lambda: len(rows(run / "timing.jsonl")) >= step and there.exists(), f"step {step} of {run.name}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Started once, with GPUs that are only names. Fails, and never skips, where SLURM cannot be had."""
    place = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([str(SCRIPT), "start", str(place), "--max-array", str(LIMIT), "--kill-wait", "20", "--gpus", "2"],
                             capture_output=True, text=True)
    if started.returncode:
        pytest.fail("expected a local SLURM cluster (Debian packages slurmctld slurmd slurm-client munge; installed when missing, by root "
                    f"and from the package index); it did not start:\n{started.stdout}{started.stderr}", pytrace=False)
    try:
        code = tmp_path_factory.mktemp("code")
        for name in ("grpo_routing", "launchers", "hydra_plugins", "conf"):
            shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "local"))
        environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf"), "PATH": f"{place / 'bin'}:{os.environ['PATH']}:/usr/sbin",
                                    "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        yield Cluster(environment, code, tmp_path_factory.mktemp("cache"))
    finally:
        subprocess.run([str(SCRIPT), "stop", str(place), "--purge"], check=True, capture_output=True)
