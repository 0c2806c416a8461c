"""What a mask flagged, by what the answer was: `python -m grpo_routing.by_answer outputs/levers --csv docs/data/levers/flags.csv`

Of the rollouts that the audit judged while training (scores.jsonl), on prompts with a hint: the share that was flagged among answers that

    hack        pass and do not do the task
    lever       hold a lever, of whatever loophole, and are no hack: right answers with a lever beside, and failed ones
    no lever    hold none

A row is an arm that labels rollouts and a kind of answer, a column the loophole of the prompt; a cell the share in the first and in the
last quarter of the training, all seeds together, and how many answers that is. `--csv FILE` writes one line per run, quarter, loophole
and kind.

Of the answers whose text was kept (rollouts.jsonl, a part of those judged) it is also known who wrote them, and whether they do the task:
the second table parts the answers of the policy that trains from those of the deployed block alone (`anchor`), over the whole training.
The deployed block is taught by what is paid and not flagged. `--kept FILE` writes its lines.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from grpo_routing.arms import group
from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.files import Record, write_atomic
from grpo_routing.results import ReportError, Run, read_runs

KINDS = ("hack", "lever", "no lever")
QUARTERS = 4
KEPT_KINDS = ("hack", "right, with a lever", "failed, with a lever", "right", "failed")
COLUMNS = ("arm", "seed", "quarter", "loophole", "kind", "flagged", "answers", "run", "code")
KEPT_COLUMNS = ("arm", "seed", "source", "loophole", "kind", "flagged", "answers", "run", "code")
FLAGGED = 0.5  # a soft label is a flag from here on, as in the audit

Row = dict[str, str | int]  # COLUMNS, or KEPT_COLUMNS


def rows_of(experiment: Path, runs: Sequence[Run]) -> tuple[list[Row], list[Row]]:
    """Of every finished run of outputs/<experiment> whose mask source labels rollouts: all judged answers, and those that were kept."""
    judged: list[Row] = []
    kept: list[Row] = []
    for arm in group(runs):
        for run in (run for run in arm.runs if run.labels):
            about = {"arm": arm.label, "seed": run.config["seed"], "run": run.name, "code": run.code}
            scored, written = (Record(experiment / "runs" / run.name / f"{name}.jsonl").rows() for name in ("scores", "rollouts"))
            trainer = run.config["trainer"]
            for rows, columns, counted in ((judged, COLUMNS, count(scored, trainer["steps"])),
                                           (kept, KEPT_COLUMNS, count_kept(scored, written, trainer["sampled_rollouts"]))):
                rows += [about | dict(zip(columns[2:5], place)) | {"flagged": flagged, "answers": answers}
                         for place, (flagged, answers) in sorted(counted.items())]
    return judged, kept


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


def count_kept(scored: list[dict], kept: list[dict], sampled: int) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(source, loophole, kind of KEPT_KINDS) -> flagged answers, answers. Every step keeps each stride-th of what it judged (audit.py)."""
    flagged, answers, by_step = Counter(), Counter(), defaultdict(list)
    for answer in kept:
        by_step[answer["step"]].append(answer)
    for step in scored:
        stride = max(1, len(step["flag"]) // max(1, sampled))
        for at, answer in zip(range(0, len(step["flag"]), stride), by_step[step["step"]]):
            if (answer["loophole"], answer["hacked"]) != (step["loophole"][at], step["hacked"][at]):
                raise ReportError(f"expected every {stride}th judged answer of step {step['step']} in rollouts.jsonl; got others than in "
                                  "scores.jsonl. Look whether both files are of one run, and run it again if not")
            if answer["loophole"] != NO_LOOPHOLE:
                other = ("right" if answer["solved"] else "failed") + ", with a lever" * step["exploited"][at]
                place = (answer["source"], answer["loophole"], "hack" if answer["hacked"] else other)
                answers[place] += 1
                flagged[place] += step["flag"][at] >= FLAGGED
    return {place: (flagged[place], total) for place, total in answers.items()}


def page(rows: list[Row]) -> list[str]:
    """Markdown lines, for either kind of rows."""
    kept = "source" in rows[0]
    loopholes = sorted({row["loophole"] for row in rows})
    lines = [f"| arm |{' written by |' * kept} answer | all loopholes | {' | '.join(loopholes)} |",
             "|---|---|---|" + "---|" * (len(loopholes) + kept)]
    for arm, source in dict.fromkeys((row["arm"], row.get("source")) for row in rows):
        for kind in KEPT_KINDS if kept else KINDS:
            own = [row for row in rows if (row["arm"], row.get("source"), row["kind"]) == (arm, source, kind)]
            shown = whole if kept else cell
            cells = [shown(own), *(shown([row for row in own if row["loophole"] == loophole]) for loophole in loopholes)]
            lines.append(f"| `{arm}` |{f' {source} |' * kept} {kind} | {' | '.join(cells)} |")
    return lines


def whole(rows: list[Row]) -> str:
    """The share over the whole training, and of how many answers."""
    flagged, answers = sum(row["flagged"] for row in rows), sum(row["answers"] for row in rows)
    return f"{flagged / answers:.2f} <sub>{answers}</sub>" if answers else "–"


def cell(rows: list[Row]) -> str:
    """Shares of the first and the last quarter, and of how many answers."""
    quarters = [[row for row in rows if row["quarter"] == quarter] for quarter in (1, QUARTERS)]
    sums = [(sum(row["flagged"] for row in own), sum(row["answers"] for row in own)) for own in quarters]
    shares = [f"{flagged / answers:.2f}" if answers else "–" for flagged, answers in sums]
    return f"{' → '.join(shares)} <sub>{', '.join(str(answers) for _, answers in sums)}</sub>"


def table(rows: list[Row]) -> str:
    """CSV of COLUMNS or KEPT_COLUMNS."""
    screen = StringIO()
    writer = csv.DictWriter(screen, KEPT_COLUMNS if "source" in rows[0] else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return screen.getvalue()


def read_table(file: Path) -> list[Row]:
    """What `table` wrote."""
    with open(file, encoding="utf-8", newline="") as lines:
        return [row | {name: int(row[name]) for name in ("seed", "quarter", "flagged", "answers") if name in row}
                for row in csv.DictReader(lines)]


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_answer", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, which holds runs/")
    parser.add_argument("--csv", type=Path, help="also write one line per run, quarter, loophole and kind of answer")
    parser.add_argument("--kept", type=Path, help="also write one line per run, source, loophole and kind of the answers that were kept")
    asked = parser.parse_args(argv)
    try:
        judged, kept = rows_of(asked.experiment, read_runs(asked.experiment))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if not judged or not kept:
        print(f"expected scores.jsonl and rollouts.jsonl of a finished run in {asked.experiment} whose mask source labels rollouts; found "
              "none. An archive does not keep them: run the experiment again", file=sys.stderr)
        return 2
    for rows, file in ((judged, asked.csv), (kept, asked.kept)):
        if file:
            write_atomic(file, table(rows).encode())
    print("\n".join([*page(judged), "", *page(kept)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
