"""How long planning and asking after a sweep of many runs take: python -m benchmarks.sweep [RUNS]

CPU seconds of whole processes, imports included, as a user starts them. `status` is asked with every run half way, as SLURM jobs of a
cluster whose squeue says that all of them run.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launchers.plan import read_plan
from launchers.submissions import new_submission, note

ARMS = ("vanilla", "erase", "erase_random", "graft", "graft_rate_matched")


def measured(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of a process and its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - start


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, environment = Path(place) / "many", dict(os.environ)
        cpu, wall = measured([sys.executable, "-m", "launchers", "plan", str(root), "model=tiny_random", "trainer=smoke",
                              "evaluation=smoke", "loophole=held_out", f"arm={','.join(ARMS)}", f"seed=range({runs // len(ARMS)})",
                              "hydra.sweeper.controls=none", f"hydra.sweep.dir={place}/hydra"], environment)
        plan = read_plan(root)
        print(f"plan    {len(plan.entries)} runs: {cpu:.1f} CPU s, {wall:.1f} s")
        names = [one.folder for one in plan.entries]
        made = new_submission(root, "slurm", names, {}).with_job("7")
        made.save(root)
        for index, entry in enumerate(plan.entries):
            note(plan.folder(entry), "start", job=made.task(index), host="node", pid=1, restart="0")
            beat = {"time": time.time(), "step": 1, "steps": 2, "doing": "training", "seconds_per_step": 1.0, "hack": 0.5, "solve": 0.1}
            (plan.folder(entry) / "heartbeat.json").write_text(json.dumps(beat))
            (plan.folder(entry) / "status.json").write_text(json.dumps({"state": "running"}))
        squeue = Path(place) / "bin" / "squeue"
        squeue.parent.mkdir()
        squeue.write_text("#!/bin/sh\ncat " + str(Path(place) / "answer") + "\n")
        squeue.chmod(0o755)
        (Path(place) / "answer").write_text("".join(f"{made.task(index)}|RUNNING|None\n" for index in range(len(names))))
        cpu, wall = measured([sys.executable, "-m", "launchers", "status", str(root)],
                             environment | {"PATH": f"{squeue.parent}:{environment['PATH']}"})
        print(f"status  {len(plan.entries)} runs: {cpu:.1f} CPU s, {wall:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
