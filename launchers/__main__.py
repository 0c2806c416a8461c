"""Sweeps from a shell: `python -m launchers plan|submit|status|watch|retry|cancel|collect outputs/<experiment>`.

    plan FOLDER experiment=headline [word=…]    compose, check and freeze every run; starts nothing (backend=local|slurm)
    submit FOLDER [--only NAME] [minutes=120]   hand over what is neither finished nor under way
    status FOLDER                               one table, once; exit status 1 unless every run has its result
    watch FOLDER [--retry]                      the same, live, until nothing is queued or running
    retry FOLDER [--only NAME] [--anyway]       start failed and lost runs again, within launcher.retries
    cancel FOLDER [--only NAME]                 end queued and running runs; submit takes them up again
    collect FOLDER                              results.parquet and the report, also of a half-finished sweep

FOLDER is all that is needed: plan.json, frozen configs and status files lie in it. NAME is a run, an arm or a loophole.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from launchers import actions, table
from launchers.plan import read_plan
from launchers.settings import LaunchError
from launchers.status import statuses

CODE = Path(__file__).resolve().parent.parent
VERBS = ("plan", "submit", "status", "watch", "retry", "cancel", "collect")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("folder", help="outputs/<experiment>")
    parser.add_argument("words", nargs="*", help="plan: Hydra's words; submit and retry: changes of the resources")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a run, an arm or a loophole; may be repeated")
    parser.add_argument("--retry", action="store_true", help="watch: start failed runs again, within launcher.retries")
    parser.add_argument("--anyway", action="store_true", help="retry: forgive what was, also beyond launcher.retries")
    asked = parser.parse_intermixed_args(argv)
    try:
        return do(asked, actions.folder_of(asked.folder))
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2


def do(asked: argparse.Namespace, root: Path) -> int:
    """One verb; returns the exit status."""
    if asked.verb == "plan" and asked.words:
        return plan_anew(root, asked.words)
    plan, changes = read_plan(root), resources_in(asked.words)
    if changes and asked.verb not in ("submit", "retry"):
        raise LaunchError(f"{asked.verb} takes no words; got {' '.join(asked.words)}. submit and retry do")
    if asked.verb == "plan":
        say(f"{root}: {actions.summary(plan, plan.entries, {})}; python -m launchers submit {root} starts them")
    elif asked.verb == "submit":
        actions.submit(plan, asked.only, changes, say)
    elif asked.verb == "retry":
        actions.retry(plan, asked.only, changes, asked.anyway, say)
    elif asked.verb == "cancel":
        actions.cancel(plan, asked.only, say)
    elif asked.verb == "watch":
        table.watch(plan, asked.retry, say)
    if asked.verb in ("status", "watch"):
        found, remark = statuses(plan)
        table.show(plan, found, remark)
        return 0 if actions.verdict(plan, found)[1] else 1
    if asked.verb == "collect":
        from grpo_routing.results import ReportError
        from launchers.collect import collect

        found, _ = statuses(plan)
        try:
            print(collect(plan, found), end="")
        except ReportError as error:
            raise LaunchError(str(error)) from error
        say(f"wrote {root / 'results.parquet'}, {root / 'report.md'}, {root / 'results.json'} and {root / 'figures'}")
    return 0


def plan_anew(root: Path, words: list[str]) -> int:
    """Planning composes configs and checks them with the trainer's own classes, so it is a process of its own: the Hydra route."""
    backend = [word for word in words if word.startswith("backend=")]
    launcher = backend[-1].partition("=")[2] if backend else "slurm"
    rest = [word for word in words if word not in backend]
    return subprocess.run([sys.executable, "-m", "grpo_routing", "-m", *rest, f"hydra/launcher={launcher}", "hydra.launcher.submit=false",
                           f"experiment_name={root.name}", f"output={root.parent}"]).returncode


def resources_in(words: list[str]) -> dict:
    """`minutes=120 partition=long` as YAML reads the values. Raises LaunchError."""
    if wrong := [word for word in words if "=" not in word]:
        raise LaunchError(f"expected key=value, such as minutes=120; got {', '.join(wrong)}. To choose runs: --only NAME")
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
