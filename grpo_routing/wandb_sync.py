"""Publish the runs of an experiment to W&B, each exactly once: `python -m grpo_routing.wandb_sync outputs/<experiment>`

    --project grpo_routing --entity TEAM --mode online|offline --only RUN (as often as you like)

Every run becomes one W&B run with an id of its own, from its files, in which the attempts are merged already (wandb_run.py). A run that is
not finished is published as far as it got. What was published before and has not changed since is left alone; what changed is published
again under its id. `--mode offline` writes what `wandb sync` takes and says that command. A run that cannot be published is
reported and hides no other; the exit status is 1 then, 2 when nothing could be tried. docs/wandb.md tells the whole way.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

from grpo_routing.results import ReportError, read_run, run_folders
from grpo_routing.wandb_run import MODES, Target, log_in, publication, publish, published

PROJECT = "grpo_routing"


def main(argv: list[str]) -> int:
    """Publish and say, run by run, what was done."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.wandb_sync", description="Publish the runs of an experiment to W&B.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--project", default=PROJECT)
    parser.add_argument("--entity", help="user or team; the default one of who is logged in")
    parser.add_argument("--mode", choices=MODES, default="online")
    parser.add_argument("--only", action="append", metavar="RUN", help="the name of a run's folder; may be given again")
    asked = parser.parse_args(argv)
    target = Target(asked.project, asked.entity, asked.mode)
    try:
        folders = chosen(run_folders(asked.experiment), asked.only)
        if target.mode == "online":
            log_in()
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    done = Counter(sync(folder, target) for folder in folders)
    print(f"{asked.experiment}: " + ", ".join(f"{count} {what}" for what, count in sorted(done.items())))
    if target.mode == "offline" and done["published"] + done["unchanged"]:
        print(f"upload with: wandb sync {shlex.quote(str(asked.experiment))}/runs/*/wandb/offline-run-*")
    return 1 if done["failed"] else 0


def chosen(folders: list[Path], only: list[str] | None) -> list[Path]:
    """Those named, or all. Raises ReportError for a name that is no run."""
    there = {folder.name: folder for folder in folders}
    if missing := [name for name in only or () if name not in there]:
        raise ReportError(f"expected --only with a run of {folders[0].parent}; got {', '.join(missing)}. "
                          f"It holds {', '.join(list(there)[:6])}{', …' if len(there) > 6 else ''}")
    return [there[name] for name in only] if only else folders


def sync(folder: Path, target: Target) -> str:
    """Publish one run unless it was; returns published, unchanged, empty or failed."""
    try:
        run = read_run(folder)
        if run.config is None:
            print(f"{folder.name}: nothing to publish yet, it has not started")
            return "empty"
        planned = publication(folder, run)
        if published(folder, planned, target):
            return "unchanged"
        publish(folder, planned, target)
    except Exception as error:  # whatever W&B or a damaged file raises, the other runs are worth publishing
        print(f"{folder.name}: FAILED: expected to publish it, but {type(error).__name__}: {error}. Mend that and call again: "
              "what is published stays", file=sys.stderr)
        return "failed"
    so_far = "" if run.finished else f" so far: {run.steps} of {run.config['trainer']['steps']} steps"
    print(f"{folder.name}: published, {run.status}{so_far}", flush=True)
    return "published"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
