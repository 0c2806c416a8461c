"""How good every mask of an experiment was, from the audit alone: `python -m grpo_routing.diagnosis outputs/sources`.

Prints a line per arm, means over seeds: recall on known and held-out loopholes, false positives, precision and F0.5 of the labels, and
the AUROC of the scores in the first and in the last third of the training, whose difference is the drift. Writes
`figures/diagnosis.png`, `.svg` and `.pdf` (curves and score histograms) and, with `--csv FILE`, the table. Definitions: oracle/quality.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from grpo_routing.arms import Arm, group
from grpo_routing.files import Record, write_atomic
from grpo_routing.results import ReportError, Run, mean, read_runs
from grpo_routing.source_figure import by_kind, draw_quality

SERIES = ("auroc_known", "auroc_held_out", "recall_known", "recall_held_out", "false_positive", "precision", "f05")
PER_PAGE = 10


@dataclass(frozen=True)
class Quality:
    """The mask of one arm."""

    label: str
    seeds: int
    series: dict[str, list[float | None]]  # per step, mean over seeds
    early: dict[str, list[float]]  # scores by kind, of one seed
    late: dict[str, list[float]]

    def third(self, name: str, last: bool) -> float | None:
        """Mean over the first or the last third of the steps."""
        values = self.series[name]
        cut = max(1, len(values) // 3)
        return mean(values[-cut:] if last else values[:cut])

    @property
    def row(self) -> dict[str, float | str | int | None]:
        about: dict[str, float | str | int | None] = {"arm": self.label, "seeds": self.seeds}
        for name in ("recall_known", "recall_held_out", "false_positive", "precision", "f05"):
            about[name] = mean(self.series[name])
        for name in ("auroc_known", "auroc_held_out"):
            about[f"{name}_first_third"], about[f"{name}_last_third"] = self.third(name, False), self.third(name, True)
        return about


def qualities(experiment: Path, runs: Sequence[Run]) -> list[Quality]:
    """Of every arm of outputs/<experiment> whose audit says something about labels or scores."""
    return [found for arm in group(runs) if (found := quality_of(arm, experiment / "runs"))]


def quality_of(arm: Arm, runs: Path) -> Quality | None:
    """None for an arm whose audit says nothing about labels or scores."""
    steps: dict[int, dict[str, list[float]]] = {}
    for run in arm.runs:
        for row in run.audit:
            for name in SERIES:
                if (value := row.get(f"audit/label_{name}")) is not None:
                    steps.setdefault(row["step"], {}).setdefault(name, []).append(value)
    if not steps:
        return None
    count = max(steps) + 1
    series = {name: [mean(steps.get(step, {}).get(name, [])) for step in range(count)] for name in SERIES}
    scored = Record(runs / arm.runs[0].name / "scores.jsonl").rows()
    held_out = arm.config["loophole"]["held_out"]
    third = max(1, len(scored) // 3)
    return Quality(arm.label, len(arm.runs), series, by_kind(scored[:third], held_out), by_kind(scored[-third:], held_out))


def table(qualities: list[Quality]) -> str:
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(qualities[0].row)
    for quality in qualities:
        writer.writerow(["" if value is None else f"{value:.4f}" if isinstance(value, float) else value for value in quality.row.values()])
    return screen.getvalue()


def page(qualities: list[Quality]) -> list[str]:
    """Markdown lines."""
    names = ("recall known", "held-out", "false pos.", "precision", "F0.5", "AUROC known, first third", "last", "held-out, first third",
             "last")
    lines = ["| mask | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for quality in qualities:
        _, seeds, *values = quality.row.values()
        lines.append(f"| `{quality.label}` | {seeds} | " + " | ".join("–" if v is None else f"{v:.2f}" for v in values) + " |")
    return lines


def main(argv: list[str]) -> int:
    """Print the table, draw the figure; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.diagnosis", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args(argv)
    try:
        found = qualities(asked.experiment, read_runs(asked.experiment))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if not found:
        print(f"no finished run in {asked.experiment} has a mask source whose labels or scores were audited", file=sys.stderr)
        return 2
    print("\n".join(page(found)))
    for number, at in enumerate(range(0, len(found), PER_PAGE), 1):
        name = "diagnosis" if number == 1 else f"diagnosis-{number}"
        draw_quality(found[at : at + PER_PAGE], asked.experiment / "figures" / name)
    if asked.csv:
        write_atomic(asked.csv, table(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
