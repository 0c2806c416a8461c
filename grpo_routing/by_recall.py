"""One experiment as a table of arms against the recall of their detector: `python -m grpo_routing.by_recall outputs/routing`.

A cell is known hack / held-out hack / solve as deployed, mean over seeds with the lowest and the highest below; arms without a
detector stand above. `--csv FILE` also writes one line per finished run and state, the small table that documents cite.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from io import StringIO
from pathlib import Path

from grpo_routing.files import write_atomic
from grpo_routing.results import BASE, DEPLOYED, STATES, TRAINED, ReportError, Run, mean, read_runs

SHOWN = ("hack_known", "hack_held_out", "solve")
COLUMNS = ("arm", "loophole", "control", "recall", "seed", "state", "hack_known", "hack_held_out", "solve", "format", "no_hint_solve",
           "no_hint_exploited", "attempted", "lazy", "run", "code")


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_recall", description="Arms against detector recall, as deployed.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--csv", type=Path, help="also write one line per finished run and state")
    asked = parser.parse_args(argv)
    try:
        runs = [run for run in read_runs(asked.experiment) if run.evaluations.keys() >= set(STATES)]
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, table(runs).encode())
    print("\n".join(page(runs)))
    return 0


def recall_of(run: Run) -> float | None:
    return run.config["mask_source"].get("recall")


def label(run: Run, runs: list[Run]) -> str:
    """The arm, its world where it is another one, and the control that a sweep put beside the arm under the same name."""
    world, name = run.config["loophole"]["name"], run.config["arm_name"]
    beside = {other.mask_control for other in runs if other.config["arm_name"] == name} != {run.mask_control}
    control = f" control={run.mask_control}" if beside and run.mask_control != "none" else ""
    return name + control + (f" ({world})" if world != "held_out" else "")


def page(runs: list[Run]) -> list[str]:
    """Markdown lines."""
    cells: dict[str, dict[float | None, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[label(run, runs)][recall_of(run)].append(run)
    recalls = sorted({recall for row in cells.values() for recall in row if recall is not None}, reverse=True)
    head = " | ".join(f"recall {recall:g}" for recall in recalls) or "no detector"
    lines = [f"| arm, as deployed | {head} |", "|---|" + "---|" * max(1, len(recalls))]
    base = [cell(runs, BASE)] if runs else []
    lines += [f"| *untrained base* | {text} |" + " |" * (len(recalls) - 1) for text in base]
    for name, row in sorted(cells.items(), key=lambda item: (None not in item[1], item[0])):
        if None in row:
            lines.append(f"| `{name}` | {cell(row[None], DEPLOYED)} |" + " |" * (len(recalls) - 1))
        else:
            lines.append(f"| `{name}` | {' | '.join(cell(row[recall], DEPLOYED) if row.get(recall) else '–' for recall in recalls)} |")
    return lines


def cell(runs: list[Run], state: str) -> str:
    values = {rate: [run.rate(state, rate) for run in runs] for rate in SHOWN}
    middle = " / ".join(f"{mean(seeds):.2f}" for seeds in values.values())
    if state == BASE or len(runs) == 1:
        return middle
    spread = " / ".join(f"{min(seeds):.2f}–{max(seeds):.2f}" for seeds in values.values())
    return f"{middle} <sub>{spread}{'' if len(runs) == 5 else f', n={len(runs)}'}</sub>"


def table(runs: list[Run]) -> str:
    """CSV of COLUMNS, one line per run and state."""
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in sorted(runs, key=lambda run: (label(run, runs), recall_of(run) or 0, run.config["seed"])):
        for state in (TRAINED, DEPLOYED) if run.config["seed"] else STATES:
            rates = {name: f"{run.rate(state, name):.4f}" for name in COLUMNS if name in run.evaluations[state].rates}
            about = {"arm": run.config["arm_name"], "loophole": run.config["loophole"]["name"], "control": run.mask_control,
                     "recall": recall_of(run), "seed": run.config["seed"], "state": state, "run": run.name, "code": run.code}
            writer.writerow([(about | rates)[name] for name in COLUMNS])
    return screen.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
