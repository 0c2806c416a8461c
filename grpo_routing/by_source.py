"""Mask sources beside their controls, every loophole held out in turn: `python -m grpo_routing.by_source outputs/sources`.

A row is an arm, a column a held-out loophole: held-out hack / known hack / solve as deployed, mean over seeds. To a source that was
told nothing about loopholes it makes no difference which is called held out, so its runs stand in every column, read by mode; so do
those of a control that keeps only a fixed count. (Between rotations problems carry other loopholes, all equally often.)
Below stand the differences to the control that a source has in the folder, paired by seed: mean and 95 % t-interval over seeds, and over
all columns together with a seed's columns averaged first, since they share the seed. A last table asks for a match in solve: where in its
training did the deployed policy of an arm (its anchors) solve most, and how much did it hack there? `--csv FILE` writes one line per run,
state and held-out loophole; `--figure FILE` draws solve against held-out hack, every seed a dot.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

from grpo_routing.files import write_atomic
from grpo_routing.results import BASE, DEPLOYED, LAST, STATES, TRAINED, ReportError, Run, read_runs

RATES = ("held_out", "known", "solve", "format")
PLACEBO = "placebo.yaml"  # the pair set that is a control of the others
COLUMNS = ("arm", "source", "control", "pairs", "told", "held_out_loophole", "seed", "state", *RATES, "run", "code")


@dataclass(frozen=True)
class Cell:
    """One run seen with one loophole held out."""

    arm: str
    source: str
    control: str
    pairs: str
    told: bool
    loophole: str
    seed: int
    rates: dict[str, dict[str, float]]  # state -> RATES
    run: str
    code: str

    @property
    def row(self) -> tuple[str, str]:
        """What the runs of one row share, without their control, and the control."""
        name = self.arm.removesuffix(f"_{self.control}")
        return f"{name} {self.pairs.removesuffix('.yaml')}" if self.pairs not in ("", "prog.yaml") else name, self.control


def cells_of(run: Run) -> list[Cell]:
    """A run in every column that it belongs to."""
    source, modes = run.config["mask_source"], run.config["loophole"]
    told = run.role not in ("vanilla", "reference") and bool(told_of(source)) and not counts_only(source)
    everything = [*modes["known"], *modes["held_out"]]
    found = []
    for loophole in modes["held_out"] if told else everything:
        rates = {}
        for state in STATES:
            by_mode = {mode: run.rate(state, f"hack_{mode}") for mode in everything}
            rates[state] = {"held_out": by_mode[loophole], "known": fmean(by_mode[mode] for mode in everything if mode != loophole),
                            "solve": run.rate(state, "solve"), "format": run.rate(state, "format")}
        found.append(Cell(run.config["arm_name"], source["name"], source.get("control", "none"), source.get("pairs", ""), told, loophole,
                          run.config["seed"], rates, run.name, run.code))
    return found


def counts_only(source: dict) -> bool:
    """Whether a control keeps nothing of its source but a count that is the same whatever the source says: then what the source was
    told cannot reach the run."""
    return source.get("control") in ("rate_matched", "random") and source.get("calibration", {}).get("rule") in ("quantile", "group")


def told_of(source: dict) -> list[str]:
    """Loopholes that a source, or a part of it, was told about."""
    inner = [told_of(part) for part in source.values() if isinstance(part, dict) and "name" in part]
    return [*source.get("known", ()), *(mode for part in inner for mode in part)]


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval; the interval of a single number is infinite."""
    middle = fmean(differences)
    if len(differences) < 2:
        return middle, -math.inf, math.inf
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return middle, middle - half, middle + half


def paired(treated: list[Cell], control: list[Cell], rate: str) -> list[float]:
    """Differences as deployed, one per seed that both have, over the loopholes that both have."""
    other = {(cell.loophole, cell.seed): cell for cell in control}
    by_seed = defaultdict(list)
    for cell in treated:
        if (cell.loophole, cell.seed) in other:
            by_seed[cell.seed].append(cell.rates[DEPLOYED][rate] - other[cell.loophole, cell.seed].rates[DEPLOYED][rate])
    return [fmean(values) for _, values in sorted(by_seed.items())]


def page(cells: list[Cell]) -> list[str]:
    """Markdown lines."""
    loopholes = sorted({cell.loophole for cell in cells})
    rows: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        rows[cell.row].append(cell)
    lines = ["| arm, as deployed | control | " + " | ".join(loopholes) + " |", "|---|---|" + "---|" * len(loopholes)]
    lines.append("| *untrained base* | | " + " | ".join(said([c for c in cells if c.loophole == mode], BASE) for mode in loopholes) + " |")
    for (name, control), own in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1] != "none", item[0][1])):
        texts = [said([cell for cell in own if cell.loophole == mode], DEPLOYED) for mode in loopholes]
        lines.append(f"| `{name}` | {'' if control == 'none' else control} | " + " | ".join(texts) + " |")
    lines += ["", "| treatment minus control | control | rate | " + " | ".join(loopholes) + " | all |",
              "|---|---|---|" + "---|" * (len(loopholes) + 1)]
    for name, control, treatment, against in pairings(rows):
        for rate in ("held_out", "known", "solve"):
            texts = []
            for mode in (*loopholes, None):
                parts = ([cell for cell in part if mode in (None, cell.loophole)] for part in (treatment, against))
                texts.append(difference(paired(*parts, rate)))
            lines.append(f"| `{name}` | {control} | {rate.replace('_', '-')} | " + " | ".join(texts) + " |")
    return lines


def pairings(rows: dict[tuple[str, str], list[Cell]]) -> list[tuple[str, str, list[Cell], list[Cell]]]:
    """Every row with what controls it: the same arm under a control word, or with the placebo pairs. (name, control, runs, its runs)."""
    found = [(name, control, rows[name, "none"], own) for (name, control), own in sorted(rows.items())
             if control != "none" and (name, "none") in rows]
    placebo = {own[0].arm: own for (_, control), own in rows.items() if own[0].pairs == PLACEBO and control == "none"}
    return found + [(name, "placebo pairs", own, placebo[own[0].arm]) for (name, control), own in sorted(rows.items())
                    if control == "none" and own[0].arm in placebo and own[0].pairs != PLACEBO]


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those that have every evaluation."""
    return [run for run in runs if run.evaluations.keys() >= set(STATES)]


def whole(runs: list[Run]) -> list[str]:
    """All tables, as markdown lines."""
    return [*page([cell for run in runs for cell in cells_of(run)]), "", *peaks(runs)]


def peaks(runs: list[Run]) -> list[str]:
    """Markdown: per arm with anchors, the highest solve rate that its deployed policy had on training prompts, and its hack rate there,
    each the mean over the last steps up to it; mean over seeds with the lowest and the highest."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for run in runs:
        if any("audit/solve_off" in row for row in run.audit[:1]):
            solve, hack = run.series("audit/solve_off"), run.series("audit/hack_off")
            best = max((step for step in range(LAST, len(solve)) if solve[step] is not None), key=lambda step: solve[step])
            found[cells_of(run)[0].row].append((solve[best], hack[best], best))
    lines = ["| arm, deployed policy in training | control | highest solve | hack at that step | step |", "|---|---|---|---|---|"]
    for (name, control), values in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "none", item[0][1])):
        texts = [f"{fmean(v):.2f} <sub>{min(v):.2f}–{max(v):.2f}</sub>" for v in list(zip(*values))[:2]]
        lines.append(f"| `{name}` | {'' if control == 'none' else control} | {texts[0]} | {texts[1]} | {fmean(v[2] for v in values):.0f} |")
    return lines if found else []


def difference(values: list[float]) -> str:
    if not values:
        return "–"
    middle, low, high = interval(values)
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]" if len(values) > 1 else f"{middle:+.2f} (n=1)"


def said(cells: list[Cell], state: str) -> str:
    if not cells:
        return "–"
    middle = " / ".join(f"{fmean(cell.rates[state][rate] for cell in cells):.2f}" for rate in ("held_out", "known", "solve"))
    return middle if state == BASE or len(cells) == 5 else f"{middle} <sub>n={len(cells)}</sub>"


def table(cells: list[Cell]) -> str:
    """CSV of COLUMNS; the base only once, it is the same for all."""
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(COLUMNS)
    seen = set()
    for cell in sorted(cells, key=lambda c: (c.row, c.loophole, c.seed)):
        for state in (TRAINED, DEPLOYED) if cell.loophole in seen else STATES:
            rates = [f"{cell.rates[state][rate]:.4f}" for rate in RATES]
            writer.writerow([cell.arm, cell.source, cell.control, cell.pairs, int(cell.told), cell.loophole, cell.seed, state, *rates,
                             cell.run, cell.code])
        seen.add(cell.loophole)
    return screen.getvalue()


def main(argv: list[str]) -> int:
    """Print the tables; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_source", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, nargs="+", help="outputs/<experiment>, which holds runs/; several are put together")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path, help="also draw FILE.png, .svg and .pdf")
    asked = parser.parse_args(argv)
    try:
        runs = [run for folder in asked.experiment for run in finished(read_runs(folder))]
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    cells = [cell for run in runs for cell in cells_of(run)]
    if not cells:
        print(f"no finished run in {', '.join(map(str, asked.experiment))}", file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, table(cells).encode())
    if asked.figure:
        from grpo_routing.source_figure import draw

        draw(cells, asked.figure)
    print("\n".join(whole(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
