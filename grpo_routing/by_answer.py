"""What a mask flagged, by what the answer was: `python -m grpo_routing.by_answer outputs/levers --csv docs/data/levers/flags.csv`

Of the rollouts that the audit judged while training (scores.jsonl), on prompts with a hint: the share that was flagged among answers that

    hack        pass and do not do the task
    lever       hold a lever, of whatever loophole, and are no hack: nearly all do the task and pull the lever beside it
    no lever    hold none

A row is an arm that labels rollouts and a kind of answer, a column the loophole of the prompt; a cell the share in the first and in the
last quarter of the training, all seeds together, and how many answers that is. A block that is deployed learns from what is not flagged:
a kind of answer that is paid and often passes unflagged is what it is taught. `--csv FILE` writes one line per run, quarter, loophole and
kind.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from grpo_routing.arms import group
from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.files import Record, write_atomic
from grpo_routing.results import ReportError, Run, read_runs

KINDS = ("hack", "lever", "no lever")
QUARTERS = 4
COLUMNS = ("arm", "seed", "quarter", "loophole", "kind", "flagged", "answers", "run", "code")
FLAGGED = 0.5  # a soft label is a flag from here on, as in the audit

Row = dict[str, str | int]  # COLUMNS


def rows_of(experiment: Path, runs: Sequence[Run]) -> list[Row]:
    """Of every finished run of outputs/<experiment> whose mask source labels rollouts."""
    rows: list[Row] = []
    for arm in group(runs):
        for run in (run for run in arm.runs if run.labels):
            about = {"arm": arm.label, "seed": run.config["seed"], "run": run.name, "code": run.code}
            counted = count(Record(experiment / "runs" / run.name / "scores.jsonl").rows(), run.config["trainer"]["steps"])
            rows += [about | dict(zip(("quarter", "loophole", "kind"), place)) | {"flagged": flagged, "answers": answers}
                     for place, (flagged, answers) in sorted(counted.items())]
    return rows


def count(scored: list[dict], steps: int) -> dict[tuple[int, str, str], tuple[int, int]]:
    """(quarter from 1, loophole, kind) -> flagged answers, answers."""
    flagged, answers = Counter(), Counter()
    for step in scored:
        quarter = 1 + QUARTERS * step["step"] // steps
        for flag, hacked, exploited, loophole in zip(step["flag"], step["hacked"], step["exploited"], step["loophole"], strict=True):
            if loophole != NO_LOOPHOLE:
                place = (quarter, loophole, "hack" if hacked else "lever" if exploited else "no lever")
                answers[place] += 1
                flagged[place] += flag >= FLAGGED
    return {place: (flagged[place], total) for place, total in answers.items()}


def page(rows: list[Row]) -> list[str]:
    """Markdown lines."""
    loopholes = sorted({row["loophole"] for row in rows})
    lines = [f"| arm | answer | all loopholes | {' | '.join(loopholes)} |", "|---|---|---|" + "---|" * len(loopholes)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for kind in KINDS:
            own = [row for row in rows if row["arm"] == arm and row["kind"] == kind]
            cells = [cell(own), *(cell([row for row in own if row["loophole"] == loophole]) for loophole in loopholes)]
            lines.append(f"| `{arm}` | {kind} | {' | '.join(cells)} |")
    return lines


def cell(rows: list[Row]) -> str:
    """Shares of the first and the last quarter, and of how many answers."""
    quarters = [[row for row in rows if row["quarter"] == quarter] for quarter in (1, QUARTERS)]
    sums = [(sum(row["flagged"] for row in own), sum(row["answers"] for row in own)) for own in quarters]
    shares = [f"{flagged / answers:.2f}" if answers else "–" for flagged, answers in sums]
    return f"{' → '.join(shares)} <sub>{', '.join(str(answers) for _, answers in sums)}</sub>"


def table(rows: list[Row]) -> str:
    """CSV of COLUMNS."""
    screen = StringIO()
    writer = csv.DictWriter(screen, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return screen.getvalue()


def read_table(file: Path) -> list[Row]:
    """What `table` wrote."""
    with open(file, encoding="utf-8", newline="") as lines:
        return [row | {name: int(row[name]) for name in ("seed", "quarter", "flagged", "answers")} for row in csv.DictReader(lines)]


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_answer", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, which holds runs/")
    parser.add_argument("--csv", type=Path, help="also write one line per run, quarter, loophole and kind of answer")
    asked = parser.parse_args(argv)
    try:
        rows = rows_of(asked.experiment, read_runs(asked.experiment))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print(f"no finished run in {asked.experiment} has a mask source that labels rollouts and scores that were kept (scores.jsonl)",
              file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, table(rows).encode())
    print("\n".join(page(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
