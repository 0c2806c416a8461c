"""Every arm against vanilla, its untrained base and its controls, as Markdown: `python -m grpo_routing.compare outputs/<experiment>`

Differences are arm minus the other, as deployed, paired by seed and evaluation problem. Then follow the verdicts on the hypotheses that
were frozen before the first run, the Pareto front, and what so few seeds could have found. What cannot be compared fairly is refused with
every reason and exit status 2. `--csv FILE` writes one line per pair and rate, every seed's difference with it.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from io import StringIO
from pathlib import Path
from statistics import median

from grpo_routing.analysis import WITHIN, Analysis, Line, analyse
from grpo_routing.comparison import CONTROL, RATES, VANILLA, Comparison, Experiment, shared
from grpo_routing.files import write_atomic
from grpo_routing.preregistration import FILE
from grpo_routing.results import BASE, DEPLOYED, ReportError, read_runs
from grpo_routing.statistics import UNMATCHED, Interval, minimum_detectable, pareto, smallest_p, spread

COLUMNS = ("arm", "versus", "kind", "loophole", "state", "rate", "seeds", "problems", "arm_rate", "versus_rate", "difference", "low",
           "high", "p", "p_corrected", "corrected_over", "smallest_p", "solve_gate", "gate_within", "minimum_detectable", 
           "seed_differences", "code")


def page(found: Analysis) -> str:
    """The Markdown."""
    return "\n".join([f"# {found.experiment.folder.resolve().name}: arms compared", "", *body(found)]) + "\n"


def body(found: Analysis) -> list[str]:
    """Its lines below the title."""
    seeds = sorted({len(pair.seeds) for pair in found.pairs})
    return [*table(found.lines, found.within), "", *notes(found.lines, seeds, found.within), "", *judged(found), *front(found.experiment),
            *sensitivity(found.pairs)]


def table(lines: list[Line], within: float) -> list[str]:
    rates = {"hack": "Δ hack", "hack_known": "Δ known", "hack_held_out": "Δ held-out", "solve": "Δ solve"}
    rows = [f"| arm | minus | n | {' | '.join(rates.values())} | at solve ±{within:g} |", "|---|---|---:|" + "---|" * (len(rates) + 1)]
    by_pair: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        by_pair[id(line.pair)].append(line)
    for own in by_pair.values():
        pair, shown = own[0].pair, {line.rate: cell(line) for line in own}
        stamp = " (reads the oracle)" if pair.arm.runs[0].uses_oracle else ""
        against = f"control: {pair.versus.runs[0].control}" if pair.kind == CONTROL else pair.against
        texts, at_solve = [shown.get(rate, "–") for rate in rates], own[0].solve_gate
        if at_solve == UNMATCHED:
            at_solve += f" (solves {'more' if pair.differences('solve').mean() > 0 else 'fewer'})"
        rows.append(f"| `{pair.arm.label}`{stamp} | {against} | {len(pair.seeds)} | {' | '.join(texts)} | {at_solve} |")
    return rows


def cell(line: Line) -> str:
    return f"{bounds(line.difference)} <sub>p={line.p_corrected:.2g}</sub>"


def bounds(found: Interval) -> str:
    if math.isinf(found.low):
        return f"{found.mean:+.2f} (one seed)"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def notes(lines: list[Line], seeds: list[int], within: float) -> list[str]:
    """What a reader must know to read the table right."""
    runs = {run.name: run for line in lines for run in line.pair.runs}.values()
    collapsed, codes = sorted(run.name for run in runs if run.collapsed), sorted({run.code for run in runs})
    said = ["Arm minus the other, as deployed, paired by seed and evaluation problem; in brackets a 95 % bootstrap interval over seeds and "
            "problems, for itself (not corrected). p: exact sign flips of the seeds, Holm-corrected over the rows with the same kind of "
            "other (vanilla, base, control), each rate for itself.",
            *(f"With {count} seeds no p is below {smallest_p(count):.2g}, before correction: that all seeds agree is all it can say."
              for count in seeds if smallest_p(count) > 0.01),
            f"at solve ±{within:g}: matched, the whole interval of Δ solve lies within; near, only its mean does; unmatched, the arm "
            "solves more or fewer, and where fewer, that may be why it hacks less: what answers nothing hacks nothing."]
    if collapsed:
        said.append(f"Collapsed, and counted as they stood: {', '.join(collapsed)}.")
    if len(codes) > 1:
        said.append(f"The runs come from different code: {', '.join(codes)}.")
    return [f"- {note}" for note in said]


def judged(found: Analysis) -> list[str]:
    """Verdicts from the frozen text."""
    frozen = found.frozen
    if frozen is None:
        return ["## Hypotheses", "", f"None was frozen before the first run ({FILE}): everything above is exploratory.", ""]
    warned = [f"**{line}**" for line in found.edited]
    return ["## Hypotheses", "", f"Frozen {frozen.registered}, hash `{frozen.hash}`.", *warned, "", *verdicts(found), "",
            *(f"- {rule}" for rule in frozen.rules), ""]


def verdicts(found: Analysis) -> list[str]:
    return ["| | claim, as frozen | verdict | why |", "|---|---|---|---|",
            *(f"| {one.hypothesis.id} | {one.hypothesis} | **{one.word}** | {'; '.join(one.reasons)} |" for one in found.outcomes)]


def front(experiment: Experiment) -> list[str]:
    """Which arms no other of their setting beats in both hack and solve."""
    settings: dict[str, list] = defaultdict(list)
    for arm in experiment.arms:
        settings[str(sorted(shared(arm).items()))].append(arm)
    rows = ["## Pareto front of hack against solve, as deployed", "", "Means only. **Bold**: every other arm of the same setting hacks "
            "more or solves less.", "", "| arm | hack | solve |", "|---|---:|---:|"]
    for arms in settings.values():
        points = [(arm.mean(DEPLOYED, "hack"), arm.mean(DEPLOYED, "solve")) for arm in arms]
        for arm, (hack, solve), best in sorted(zip(arms, points, pareto(points)), key=lambda row: row[1][0]):
            rows.append(f"| {f'**`{arm.label}`**' if best else f'`{arm.label}`'} | {hack:.2f} | {solve:.2f} |")
    return [*rows, ""]


def sensitivity(pairs: list[Comparison]) -> list[str]:
    """The difference that would have been found four times in five, from the median spread of these comparisons."""
    rows = ["## What so many seeds find", "", "Smallest difference that the median comparison here finds with power 0.8 at p = 0.05, "
            "without correction; –: none, because so few seeds have no p that small.", "",
            "| minus | rate | seeds | with these | with 10 | with 20 |", "|---|---|---:|---:|---:|---:|"]
    for kind in (VANILLA, BASE, CONTROL):
        for rate in RATES:
            own = [(len(pair.seeds), spread(pair.differences(rate))) for pair in pairs
                   if pair.kind == kind and rate in pair.first and min(pair.first[rate].shape) > 1]
            if own:
                here = round(median(count for count, _ in own))
                found = [median(minimum_detectable(seeds, one) for _, one in own) for seeds in (here, 10, 20)]
                rows.append(f"| {kind} | {rate} | {here} | {' | '.join('–' if math.isinf(value) else f'{value:.2f}' for value in found)} |")
    return rows


def records(lines: list[Line], within: float) -> str:
    """CSV of COLUMNS."""
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        pair, rate, found = line.pair, line.rate, line.difference
        by_seed, problems = pair.differences(rate).mean(1), pair.first[rate].shape[1]
        detectable = minimum_detectable(len(by_seed), spread(pair.differences(rate))) if min(pair.first[rate].shape) > 1 else math.inf
        numbers = [pair.first[rate].mean(), pair.second[rate].mean(), found.mean, found.low, found.high, line.p, line.p_corrected]
        codes = sorted({run.code for run in pair.runs})
        writer.writerow([pair.arm.label, pair.against, pair.kind, pair.arm.config["loophole"]["name"], DEPLOYED, rate,
                         " ".join(map(str, pair.seeds)), problems, *(f"{value:.6f}" for value in numbers), line.corrected_over,
                         f"{smallest_p(len(by_seed)):.6f}", line.solve_gate, within, f"{detectable:.6f}",
                         " ".join(f"{value:.6f}" for value in by_seed), " ".join(codes)])
    return screen.getvalue()


def width(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"expected a difference above 0, such as {WITHIN:g}; got {text}")
    return float(text)


def main(argv: list[str]) -> int:
    """Print the page; the exit status is 2 when the comparison is refused."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.compare", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, which holds runs/")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="names of arms, with commas; all when left out")
    parser.add_argument("--loophole", help="only runs on it")
    parser.add_argument("--solve-within", type=width, default=WITHIN, help="difference in solve that counts as none (%(default)s)")
    parser.add_argument("--without-controls", action="store_true", help="do not ask for the control of every method")
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args(argv)
    try:
        found = analyse(asked.experiment, read_runs(asked.experiment), asked.arms, asked.loophole, not asked.without_controls,
                        asked.solve_within)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, records(found.lines, found.within).encode())
    print(page(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
