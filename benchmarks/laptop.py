"""What sixty laptop-preset steps on the organism cost, and where: the run itself, its sandbox included, without its evaluations.

    python -m benchmarks.laptop            # vanilla, erase and route, one after another
    python -m benchmarks.laptop arm=erase trainer.audit_every=64
    python -m benchmarks.laptop early      # twenty steps of erase, grading begun while slow rows are still sampled against not

CPU seconds of the process and its children. The organism is the one that runs use, from the cache; it is made when it is missing.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from benchmarks.measure import cpu_seconds, table
from benchmarks.step import Parts
from grpo_routing import run as runs
from grpo_routing import train
from grpo_routing.stages import composed
from grpo_routing.train import Line

ARMS = (("arm=vanilla",), ("arm=erase",), ("arm=route",))
PARTS = ("sampling", "grading", "judging")
PAIRS = 4  # and one that warms up


def spent(words: tuple[str, ...], folder: Path, by_part: bool = True) -> dict[str, float]:
    """CPU seconds of the steps of one run, whole and by part, and seconds of the clock; what no part has is the update."""
    parts, plain, total = Parts(PARTS), runs.train, {}

    def timed(ready: runs.Plan, folder: Path, line: Line, *rest: object) -> str | None:
        if by_part:
            line.policy.sample = parts.timed("sampling", line.policy.sample)
            line.audit.oracle = parts.timed("judging", line.audit.oracle)
            line = replace(line, grader=parts.timed("grading", line.grader))
        clock, before = time.monotonic(), cpu_seconds()
        cause = plain(ready, folder, line, *rest)
        total.update(steps=cpu_seconds() - before, clock=time.monotonic() - clock)
        if by_part:
            del line.policy.sample  # its class' own again, for the evaluations
        return cause

    runs.train = timed
    try:
        runs.run(OmegaConf.to_container(composed("loophole=held_out", *words, "evaluation=smoke", f"output={folder}"), resolve=True))
    finally:
        runs.train = plain
    return total | parts.spent


def early(folder: Path) -> list[list[object]]:
    """A row for either way of grading: medians over interleaved runs."""
    ways = {"after sampling": lambda grader, problems: None,
            "begun while sampling": lambda grader, problems: lambda places, texts: grader.begin([problems[at] for at in places], texts)}
    found, plain = defaultdict(list), train.begin_with
    try:
        for pair in range(PAIRS + 1):
            for name, train.begin_with in ways.items():
                words = ("arm=erase", "trainer.steps=20", f"seed={pair}", f"experiment_name={name.split()[0]}")
                found[name].append(spent(words, folder, by_part=False))
    finally:
        train.begin_with = plain
    return [[name, *(median(one[key] for one in all_of[1:]) for key in ("steps", "clock"))] for name, all_of in found.items()]


def main(words: list[str]) -> int:
    rows = []
    with TemporaryDirectory() as folder:
        if words == ["early"]:
            print(table([f"20 steps of erase, {len(os.sched_getaffinity(0))} cores, grading", "CPU s", "s"], early(Path(folder))))
            return 0
        for arm in [tuple(words)] if words else ARMS:
            found = spent(arm, Path(folder))
            update = found["steps"] - sum(found[part] for part in PARTS)
            rows.append([" ".join(arm), found["steps"], *(found[part] for part in PARTS), update])
    print(table(["60 steps, one thread", "CPU s", *PARTS, "update and the rest"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
