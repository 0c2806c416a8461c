"""What sixty laptop-preset steps on the organism cost, and where: the run itself, its sandbox included, without its evaluations.

    python -m benchmarks.laptop            # vanilla, erase and route, one after another
    python -m benchmarks.laptop arm=erase trainer.audit_every=64

CPU seconds of the process and its children. The organism is the one that runs use, from the cache; it is made when it is missing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from benchmarks.measure import cpu_seconds, table
from benchmarks.step import Parts
from grpo_routing import run as runs
from grpo_routing.stages import composed
from grpo_routing.train import Line

ARMS = (("arm=vanilla",), ("arm=erase",), ("arm=route",))
PARTS = ("sampling", "grading", "judging")


def spent(words: tuple[str, ...], folder: Path) -> dict[str, float]:
    """CPU seconds of the steps of one run, whole and by part; what no part has is the update."""
    parts, plain, total = Parts(PARTS), runs.train, {}

    def timed(ready: runs.Plan, folder: Path, line: Line, *rest: object) -> str | None:
        line.policy.sample = parts.timed("sampling", line.policy.sample)
        line.audit.oracle = parts.timed("judging", line.audit.oracle)
        line = replace(line, grader=parts.timed("grading", line.grader))
        before = cpu_seconds()
        cause = plain(ready, folder, line, *rest)
        total["steps"] = cpu_seconds() - before
        del line.policy.sample  # its class' own again, for the evaluations
        return cause

    runs.train = timed
    try:
        runs.run(OmegaConf.to_container(composed("loophole=held_out", *words, "evaluation=smoke", f"output={folder}"), resolve=True))
    finally:
        runs.train = plain
    return total | parts.spent


def main(words: list[str]) -> int:
    rows = []
    with TemporaryDirectory() as folder:
        for arm in [tuple(words)] if words else ARMS:
            found = spent(arm, Path(folder))
            update = found["steps"] - sum(found[part] for part in PARTS)
            rows.append([" ".join(arm), found["steps"], *(found[part] for part in PARTS), update])
    print(table(["60 steps, one thread", "CPU s", *PARTS, "update and the rest"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
