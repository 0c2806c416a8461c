"""One run in the terminal: how its training went, what its policies do, and what it wrote last.

    python -m grpo_routing.show outputs/<experiment>/runs/<run> [--samples 3]

Reads the run's files alone, also while it trains. A curve is the mean over five steps, squeezed into the width of the terminal; · is a
step without such rollouts. Verdicts are the oracle's, which training never saw.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_routing.html.samples import Sample, evaluated, trained
from grpo_routing.notes import number
from grpo_routing.results import DEPLOYED, STATES, ReportError, Run, mean, read_run

BLOCKS, NOTHING = "▁▂▃▄▅▆▇█", "·"
CURVES = {"reward": "train/reward", "hack": "audit/hack", "solve": "audit/solve", "format": "train/format"}  # words -> metric
RATES = {"hack": "hack", "known": "hack_known", "held-out": "hack_held_out", "solve": "solve", "format": "format"}
NARROW = 24  # columns that name, first and last value of a curve take
STYLES = {"hacked": "red", "solved": "green", "neither": "dim"}


def main(argv: list[str]) -> int:
    """Print the run; the exit status is 2 when the folder is no run."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.show", description="One run: curves, rates, last completions.")
    parser.add_argument("run", type=Path, help="outputs/<experiment>/runs/<run>")
    parser.add_argument("--samples", type=int, default=3, help="completions of each policy (3)")
    asked = parser.parse_args(argv)
    try:
        Console(highlight=False).print(page(asked.run, asked.samples, Console().width))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def page(folder: Path, samples: int, width: int) -> Group:
    """Everything, top to bottom. Raises ReportError when the folder is no run, or where a file is damaged."""
    if not (folder / "config.yaml").exists():
        raise ReportError(f"expected a run folder with config.yaml; got {folder}. Name one of outputs/<experiment>/runs/")
    run = read_run(folder)
    parts: list[RenderableType] = [head(run), Text(), curves(run, width - NARROW), Text()]
    parts += [rates(run), Text()] if run.evaluations else []
    rows = trained(folder, run)[:samples] + (evaluated(folder, run)[:samples] if DEPLOYED in run.evaluations else [])
    return Group(*parts, *(sample(row) for row in rows))


def head(run: Run) -> Text:
    """Name, state and, of a run that is not done, why."""
    planned = run.config["trainer"]["steps"]
    words = Text(run.name, "bold")
    words.append(f"\n{run.status}, {run.steps} of {planned} steps, commit {run.code or 'unknown'}", "default not bold")
    if run.cause:
        words.append(f"\n{printable(run.cause)}", "red not bold")
    return words


def curves(run: Run, width: int) -> Table:
    """A line of blocks per metric. Rates fill their height at 1, the reward at what a usable answer that passes is paid."""
    table = Table.grid(padding=(0, 1))
    paid = run.config["reward"]
    most = {"reward": paid["format_reward"] + paid["pass_reward"]}
    for words, metric in CURVES.items():
        values = run.series(metric)
        if measured := [value for value in values if value is not None]:
            table.add_row(words, number(measured[0]), sparkline(values, width, most.get(words, 1.0)), number(measured[-1]))
    return table


def sparkline(values: list[float | None], width: int, most: float = 1.0) -> str:
    """At most `width` blocks, each the mean of its share of the values; `most` is a full block."""
    count = max(1, min(width, len(values)))
    parts = [mean(values[len(values) * at // count : len(values) * (at + 1) // count]) for at in range(count)]
    return "".join(NOTHING if part is None else BLOCKS[min(len(BLOCKS) - 1, max(0, int(part / most * len(BLOCKS))))] for part in parts)


def rates(run: Run) -> Table:
    """What the evaluations measured, a row per policy."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("evaluated")
    for words in RATES:
        table.add_column(words, justify="right")
    for state in STATES:
        if state in run.evaluations:
            table.add_row(state.replace("_", " "), *(number(run.rate(state, rate)) for rate in RATES.values()))
    return table


def sample(row: Sample) -> Panel:
    """A completion between what was asked and what came of it."""
    paid = "passed" if row.paid else "not passed"
    reward = "" if row.reward is None else f" (reward {row.reward:g})"
    verdict = Text.assemble("environment: ", (paid, "bold"), f"{reward}   truth: ", (row.verdict, f"bold {STYLES[row.verdict]}"))
    held = ", held out" if row.held_out else ""
    title = Text(printable(f"{row.where}, {row.loophole}{held}: {row.problem}"))
    return Panel(Group(Text(printable(row.text)), Text(), verdict), title=title, title_align="left")


def printable(words: str) -> str:
    """Completions are untrusted: nothing but text and line ends reaches the terminal, no escape sequence."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
