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
from typing import Any

from grpo_routing.files import write_atomic
from grpo_routing.results import BASE, DEPLOYED, STATES, TRAINED, ReportError, Run, mean, read_runs

SHOWN = ("hack_known", "hack_held_out", "solve")
COLUMNS = ("arm", "loophole", "control", "recall", "seed", "state", "hack_known", "hack_held_out", "solve", "format", "no_hint_solve",
           "no_hint_exploited", "attempted", "lazy", "run", "code")
ABOUT = ("arm", "loophole", "control", "recall", "seed", "state", "run", "code")

Row = dict[str, Any]  # COLUMNS of a finished run in one state of its policy; recall is None without a detector


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_recall", description="Arms against detector recall, as deployed.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--csv", type=Path, help="also write one line per finished run and state")
    asked = parser.parse_args(argv)
    try:
        rows = rows_of([run for run in read_runs(asked.experiment) if run.evaluations.keys() >= set(STATES)])
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, table(rows).encode())
    print("\n".join(page(rows)))
    return 0


def rows_of(runs: list[Run]) -> list[Row]:
    """A row per run and state, by arm, recall and seed. The untrained policy is the same for all seeds and stands with the first."""
    rows = []
    for run in runs:
        about = {"arm": run.config["arm_name"], "loophole": run.config["loophole"]["name"], "control": run.mask_control,
                 "recall": run.config["mask_source"].get("recall"), "seed": run.config["seed"], "run": run.name, "code": run.code}
        for state in (TRAINED, DEPLOYED) if run.config["seed"] else STATES:
            rates = run.evaluations[state].rates
            rows.append(about | {"state": state} | {name: run.rate(state, name) for name in COLUMNS if name in rates})
    return sorted(rows, key=lambda row: (label(row, rows), row["recall"] or 0, row["seed"]))


def read_table(file: Path) -> list[Row]:
    """What `table` wrote. Before there were controls it had no column for them."""
    with open(file, encoding="utf-8", newline="") as lines:
        found = list(csv.DictReader(lines))
    return [{"control": "none"} | row | {"seed": int(row["seed"]), "recall": float(row["recall"]) if row["recall"] else None}
            | {name: float(row[name]) for name in row if name not in ABOUT} for row in found]


def label(row: Row, rows: list[Row]) -> str:
    """The arm, its world where it is another one, and the control that a sweep put beside the arm under the same name."""
    beside = {other["control"] for other in rows if other["arm"] == row["arm"]} != {row["control"]}
    control = f" control={row['control']}" if beside and row["control"] != "none" else ""
    return row["arm"] + control + (f" ({row['loophole']})" if row["loophole"] != "held_out" else "")


def page(rows: list[Row]) -> list[str]:
    """Markdown lines."""
    cells: dict[str, dict[float | None, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["state"] == DEPLOYED:
            cells[label(row, rows)][row["recall"]].append(row)
    recalls = sorted({recall for own in cells.values() for recall in own if recall is not None}, reverse=True)
    head = " | ".join(f"recall {recall:g}" for recall in recalls) or "no detector"
    lines = [f"| arm, as deployed | {head} |", "|---|" + "---|" * max(1, len(recalls))]
    if base := [row for row in rows if row["state"] == BASE]:
        lines.append(f"| *untrained base* | {cell(base)} |" + " |" * (len(recalls) - 1))
    for name, own in sorted(cells.items(), key=lambda item: (None not in item[1], item[0])):
        if None in own:
            lines.append(f"| `{name}` | {cell(own[None])} |" + " |" * (len(recalls) - 1))
        else:
            lines.append(f"| `{name}` | {' | '.join(cell(own[recall]) if own.get(recall) else '–' for recall in recalls)} |")
    return lines


def cell(rows: list[Row]) -> str:
    values = {rate: [row[rate] for row in rows] for rate in SHOWN}
    middle = " / ".join(f"{mean(seeds):.2f}" for seeds in values.values())
    if rows[0]["state"] == BASE or len(rows) == 1:
        return middle
    spread = " / ".join(f"{min(seeds):.2f}–{max(seeds):.2f}" for seeds in values.values())
    return f"{middle} <sub>{spread}{'' if len(rows) == 5 else f', n={len(rows)}'}</sub>"


def table(rows: list[Row]) -> str:
    """CSV of COLUMNS, one line per run and state."""
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        shown = {name: row[name] if name in ABOUT else f"{row[name]:.4f}" for name in row}
        writer.writerow([shown[name] for name in COLUMNS])
    return screen.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
