"""The results of an experiment, read from the files of its runs: a page, a table, a JSON array and figures.

    python -m grpo_routing.report outputs/<experiment> [--format text|json|markdown] [--watch [SECONDS]]

It writes report.html (html/page.py), report.md, results.json, results.parquet (parquet.py), figures/comparison.{png,svg,pdf} and, for arms
that label rollouts or have a quarantine, figures/health*.{png,svg,pdf} into the experiment's folder and prints the chosen format. Finished
runs enter a row, collapsed ones with their evaluation among them; every other run is listed with its state and the cause. A rate that was
not measured is null in JSON and – in the table, never 0. Running it twice gives the same files. With --watch report.html alone is written
again and again until no run is left to wait for or you interrupt, then everything once.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_routing.analysis import Analysis, analysed
from grpo_routing.arms import Arm
from grpo_routing.compare import body
from grpo_routing.figures import draw, wrapped
from grpo_routing.files import write_atomic
from grpo_routing.health_figure import draw_health, pages
from grpo_routing.html.material import read
from grpo_routing.html.page import write_page
from grpo_routing.html.watch import watch
from grpo_routing.notes import bases, facts, flags, heading, interval, notes, number, states
from grpo_routing.parquet import write_parquet
from grpo_routing.results import BASE, DEPLOYED, TRAINED, ReportError, Run, flat_objects, read_runs

WIDTH = 120  # columns of the text
RATE_COLUMNS = {"hack": "hack", "known": "hack_known", "held-out": "hack_held_out", "attempted": "attempted", "lazy": "lazy",
                "format": "format", "solve": "solve"}  # column -> rate
COLUMNS = (*RATE_COLUMNS, "Δ base", "last-5 hack", "last-5 solve")


def main(argv: list[str]) -> int:
    """Write the report and print it; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.report", description="Page, table, JSON and figures of an experiment.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text")
    parser.add_argument("--watch", type=int, nargs="?", const=30, metavar="SECONDS", help="keep report.html fresh during a sweep (30)")
    parser.add_argument("--without-controls", action="store_true", help="compare methods whose control is not in this experiment")
    asked = parser.parse_args(argv)
    controls = not asked.without_controls
    if asked.watch is not None and asked.watch < 1:
        parser.error(f"expected --watch with at least 1 second; got {asked.watch}")
    try:
        if asked.watch:
            watch(asked.experiment, asked.watch, controls)
        table = write(asked.experiment, controls=controls)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    files = {"json": "results.json", "markdown": "report.md"}
    print((asked.experiment / files[asked.format]).read_text(encoding="utf-8") if asked.format in files else table, end="")
    return 0


def load(experiment: Path) -> list[dict]:
    """One flat object per run and state, with the same keys throughout. Raises ReportError when there is no run."""
    return flat_objects(read_runs(experiment))


def write(experiment: Path, launched: Mapping[str, dict] | None = None, controls: bool = True) -> str:
    """Write the page, report.md, results.json, results.parquet and the figures; return the text table. `launched` is what a launcher knows
    of the runs (parquet.py); with `controls` False no method is asked for its control. Raises ReportError when there is no run."""
    material = read(experiment)
    runs, name, arms, unfinished = material.runs, material.name, material.arms, material.unfinished
    if arms:
        draw(arms, [", ".join(flags(arm)) for arm in arms], name, facts(arms), experiment / "figures" / "comparison")
        draw_health(arms, name, experiment / "figures")
    found = analysed(experiment, runs, controls)
    write_page(material, found)
    write_atomic(experiment / "results.json", (json.dumps(flat_objects(runs), indent=1) + "\n").encode())
    write_parquet(experiment, runs, launched or {})
    write_atomic(experiment / "report.md", markdown(arms, unfinished, name, found).encode())
    return text(arms, unfinished, name)


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """One policy's line of the table: `block` is the heading above it, a cell is a value and its interval."""

    block: str
    arm: tuple[str, str]  # label, flags
    state: tuple[str, str]
    seeds: str
    cells: tuple[tuple[str, str], ...]  # one per column


def table_rows(arms: list[Arm]) -> list[Row]:
    """The distinct bases, then every arm; one row for an arm whose two states are one policy."""
    rows = [Row("", ("base", who), ("untrained", ""), "", cells(base, BASE)) for who, base in bases(arms)]
    for arm in arms:
        head, seeds = (arm.label, ", ".join(flags(arm))), str(len(arm.runs))
        if arm.same_policy:
            rows.append(Row(arm.block, head, ("as trained", "= deployed"), seeds, cells(arm, TRAINED)))
        else:
            rows.append(Row(arm.block, head, ("as trained", ""), seeds, cells(arm, TRAINED)))
            rows.append(Row(arm.block, ("", ""), ("as deployed", ""), "", cells(arm, DEPLOYED)))
    return rows


def cells(arm: Arm, state: str) -> tuple[tuple[str, str], ...]:
    """The columns of one policy. last-5 is measured while training, so it stands beside the policy as trained."""
    rates = [(number(arm.mean(state, rate)), interval(arm.span(state, rate))) for rate in RATE_COLUMNS.values()]
    gain = "" if state == BASE else number(arm.gain(state), "+.2f")
    last = [number(arm.last(rate)) if state == TRAINED else "" for rate in ("hack", "solve")]
    return (*rates, (gain, ""), *((value, "") for value in last))


def text(arms: list[Arm], unfinished: list[Run], name: str) -> str:
    """The table, its notes and the unfinished runs in WIDTH columns; without colour, so that a pipe gets the same."""
    table, block = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style=""), ""
    for column in ("arm", "policy", "n", *COLUMNS):
        left = column in ("arm", "policy")
        table.add_column(column.replace("5 ", "5\n"), justify="left" if left else "right")
    for row in table_rows(arms):
        if row.block != block:
            block = row.block
            table.add_row(f"\n── {block}")
        head = "\n".join(line for words in row.arm for line in wrapped(words, 24))
        table.add_row(head, "\n".join(row.state).rstrip(), row.seeds, *("\n".join(cell).rstrip() for cell in row.cells))
    screen = StringIO()
    Console(file=screen, width=WIDTH, color_system=None, highlight=False, markup=False).print(table)
    lines = [heading(arms, unfinished, name), ""]
    if arms:
        said = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes(arms)]
        lines += [*screen.getvalue().splitlines(), "", *said, ""]
    lines += [f"{len(unfinished)} not finished and in no row of the table:"] if unfinished else []
    lines += [textwrap.fill(f"  {line}", WIDTH, subsequent_indent="    ") for line in states(unfinished)]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def markdown(arms: list[Arm], unfinished: list[Run], name: str, found: Analysis | ReportError) -> str:
    """The same as a page, with the comparison, the picture and each run's pedigree."""
    lines = [f"# {name}", "", heading(arms, unfinished, name).partition(": ")[2], ""]
    if arms:
        lines += ["![Hack and solve rates per arm, and training curves](figures/comparison.png)", "", *markdown_table(arms)]
    lines += ["", *(f"- {note}" for note in notes(arms))] if arms else []
    lines += ["", "## Comparison", "", *([str(found)] if isinstance(found, ReportError) else body(found))]
    health = [f"![Labels, norms and rates of every arm while training](figures/{file}.png)" for file in pages(arms)]
    lines += ["", "## Health", "", *health] if health else []
    lines += ["", "## Not finished", "", *(f"- {line}" for line in states(unfinished))] if unfinished else []
    lines += ["", "## Runs", "", "| run | arm | seed | steps | code |", "|---|---|---:|---:|---|"] if arms else []
    for arm in arms:
        for run in arm.runs:
            lines.append(f"| [{run.name}](runs/{run.name}) | {arm.label} | {run.config['seed']} | {run.steps} | {run.code} |")
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(arms: list[Arm], columns: tuple[str, ...] = COLUMNS) -> list[str]:
    """The table of all rates, or of some COLUMNS; a range stands below its mean."""
    lines, block = ["| " + " | ".join(("arm", "policy", "n", *columns)) + " |", "|---|---|" + "---:|" * (len(columns) + 1)], ""
    for row in table_rows(arms):
        if row.block != block:
            block = row.block
            lines.append(f"| **{block}** |" + " |" * (len(columns) + 2))
        pairs = (row.arm, row.state, (row.seeds, ""), *(row.cells[COLUMNS.index(column)] for column in columns))
        lines.append("| " + " | ".join(f"{value} <sub>{below}</sub>" if below else value for value, below in pairs) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
