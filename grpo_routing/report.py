"""The results of an experiment, read from the files of its runs: a table, a JSON array and a figure.

    python -m grpo_routing.report outputs/<experiment> [--format text|json|markdown]

It writes report.md, results.json, figures/comparison.{png,svg} and, for arms that label rollouts or have a quarantine,
figures/health*.{png,svg} into the experiment's folder and prints the chosen format. Finished runs enter a row, collapsed
ones with their evaluation among them; every other run is listed with its state and the cause. A rate that was not measured
is null in JSON and – in the table, never 0. Running it twice gives the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_routing.arms import Arm, group
from grpo_routing.figures import draw, wrapped
from grpo_routing.files import write_atomic
from grpo_routing.health_figure import draw_health, pages
from grpo_routing.results import BASE, DEPLOYED, TRAINED, ReportError, Run, flat_objects, read_runs

WIDTH = 120  # columns of the text
FEW = 4  # runs that a heading names one by one
RATE_COLUMNS = {"hack": "hack", "known": "hack_known", "held-out": "hack_held_out", "attempted": "attempted", "lazy": "lazy",
                "format": "format", "solve": "solve"}  # column -> rate
COLUMNS = (*RATE_COLUMNS, "Δ base", "last-5 hack", "last-5 solve")


def main(argv: list[str]) -> int:
    """Write the report and print it; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.report", description="Table, JSON and figure of an experiment.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text")
    asked = parser.parse_args(argv)
    try:
        table = write(asked.experiment)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    files = {"json": "results.json", "markdown": "report.md"}
    print((asked.experiment / files[asked.format]).read_text(encoding="utf-8") if asked.format in files else table, end="")
    return 0


def load(experiment: Path) -> list[dict]:
    """One flat object per run and state, with the same keys throughout. Raises ReportError when there is no run."""
    return flat_objects(read_runs(experiment))


def write(experiment: Path) -> str:
    """Write report.md, results.json and the figure; return the text table. Raises ReportError when there is no run."""
    runs, name = read_runs(experiment), experiment.resolve().name
    arms, unfinished = group(runs), [run for run in runs if not run.finished]
    if arms:
        draw(arms, [", ".join(flags(arm)) for arm in arms], name, facts(arms), experiment / "figures" / "comparison")
        draw_health(arms, name, experiment / "figures")
    write_atomic(experiment / "results.json", (json.dumps(flat_objects(runs), indent=1) + "\n").encode())
    write_atomic(experiment / "report.md", markdown(arms, unfinished, name).encode())
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


def whose(same: list[tuple[Arm, Run]]) -> str:
    """The runs that share a base: by name when they are few, else how many and on which loopholes."""
    if len(same) <= FEW:
        return ", ".join(f"{arm.label} s{run.config['seed']}" for arm, run in same)
    return f"{len(same)} runs on {', '.join(sorted({run.config['loophole']['name'] for _, run in same}))}"


def table_rows(arms: list[Arm]) -> list[Row]:
    """The distinct bases, then every arm; one row for an arm whose two states are one policy."""
    bases: dict[str, list[tuple[Arm, Run]]] = defaultdict(list)
    for arm in arms:
        for run in arm.runs:
            bases[json.dumps(run.evaluations[BASE].rates, sort_keys=True)].append((arm, run))
    rows = []
    for same in bases.values():
        who = "" if len(bases) == 1 else "of " + whose(same)
        arm, run = same[0]
        rows.append(Row("", ("base", who), ("untrained", ""), "", cells(Arm(arm.label, (run,)), BASE)))
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


def number(value: float | None, form: str = ".2f") -> str:
    """A share in the table; – is not measured."""
    return "–" if value is None else format(value, form)


def interval(span: tuple[float, float] | None) -> str:
    """The lower and upper bound of a share, without the leading 0; empty where there is none."""
    return "–".join(f"{bound:.2f}".removeprefix("0") for bound in span) if span else ""


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


def markdown(arms: list[Arm], unfinished: list[Run], name: str) -> str:
    """The same as a page, with the picture and each run's pedigree."""
    lines = [f"# {name}", "", heading(arms, unfinished, name).partition(": ")[2], ""]
    if arms:
        lines += ["![Hack and solve rates per arm, and training curves](figures/comparison.png)", "",
                  "| " + " | ".join(("arm", "policy", "n", *COLUMNS)) + " |", "|---|---|" + "---:|" * (len(COLUMNS) + 1)]
    block = ""
    for row in table_rows(arms):
        if row.block != block:
            block = row.block
            lines.append(f"| **{block}** |" + " |" * (len(COLUMNS) + 2))
        pairs = (row.arm, row.state, (row.seeds, ""), *row.cells)
        lines.append("| " + " | ".join(f"{value} <sub>{below}</sub>" if below else value for value, below in pairs) + " |")
    lines += ["", *(f"- {note}" for note in notes(arms))] if arms else []
    health = [f"![Labels, norms and rates of every arm while training](figures/{file}.png)" for file in pages(arms)]
    lines += ["", "## Health", "", *health] if health else []
    lines += ["", "## Not finished", "", *(f"- {line}" for line in states(unfinished))] if unfinished else []
    lines += ["", "## Runs", "", "| run | arm | seed | steps | code |", "|---|---|---:|---:|---|"] if arms else []
    for arm in arms:
        for run in arm.runs:
            lines.append(f"| [{run.name}](runs/{run.name}) | {arm.label} | {run.config['seed']} | {run.steps} | {run.code} |")
    return "\n".join(lines).rstrip() + "\n"


def heading(arms: list[Arm], unfinished: list[Run], name: str) -> str:
    """One sentence: how many runs the table stands on, how many of them collapsed, and their size."""
    finished = sum(len(arm.runs) for arm in arms)
    fallen, lost = sum(arm.collapsed for arm in arms), sum(run.collapsed for run in unfinished)
    counts = [f"{fallen} of them collapsed"] * bool(fallen) + [f"{lost} collapsed and could not be evaluated"] * bool(lost)
    return ", ".join([f"{name}: {finished} of {finished + len(unfinished)} runs finished", *counts, *facts(arms)]) + "."


def facts(arms: list[Arm]) -> list[str]:
    """The size of the finished runs, a number each or a range where they differ; nothing without a finished run."""
    runs = [run for arm in arms for run in arm.runs]
    sizes = {"training steps": {run.steps for run in runs},
             "hinted evaluation samples": {run.evaluations[TRAINED].samples["hack"] for run in runs}}
    return [f"{'–'.join(map(str, sorted({min(seen), max(seen)})))} {what}" for what, seen in sizes.items() if seen]


def states(unfinished: list[Run]) -> list[str]:
    """A line per run that is in no row: how far it came and why it stopped."""
    return [f"{run.name}: {run.status} after {run.steps} steps" + (f" of {run.config['trainer']['steps']}" if run.config else "")
            + (f": {' '.join(run.cause.split())}" if run.cause else "") for run in unfinished]


def flags(arm: Arm) -> list[str]:
    """What a reader must know beside the arm's name; MEANING explains each."""
    loophole, usable, before = arm.config["loophole"], arm.mean(DEPLOYED, "format"), arm.mean(BASE, "format")
    holds = {f"collapsed: {arm.collapsed} of {len(arm.runs)}": arm.collapsed > 0,
             f"broken: format {usable:.2f}": usable < before / 2,  # what answers nothing hacks nothing
             "reference: no loophole": arm.role == "reference",
             f"control: {arm.runs[0].control}": arm.role == "control",
             f"adapter {arm.config['adapter']['name']}": arm.runs[0].uses_oracle,  # the heading above it does not say it
             "imitation": arm.config["extra_rollouts"]["name"] == "teacher",
             f"names: {loophole['evaluation_family']}": loophole["evaluation_family"] != loophole["train_family"]}
    return [flag for flag, raised in holds.items() if raised]


MEANING = {  # what a flag says before its colon, or a heading -> what it means
    "reference": "no loophole pays in training and its prompts carry no hint: what honest GRPO reaches.",
    "collapsed": "the tripwire stopped so many of the runs (health.py; the cause is in their status.json and below). They count as they "
                 "stood, because the survivors alone would flatter the arm; in means their curves stand still from there on.",
    "control": "a treatment without what should make it work; the method counts only where it beats this.",
    "control: random": "the same treatment with random directions, or with random numbers in place of scores.",
    "control: shuffled": "the same treatment; the texts of the pairs were dealt anew into hacks and clean answers.",
    "control: nonhack": "the same treatment along a real direction that is not about hacking: one clean answer minus another.",
    "control: haar": "the same treatment along random directions of the same shape and length.",
    "control: inverted": "the same treatment turned round: axes with the opposite sign, or flags on the rollouts that look cleanest.",
    "control: rate_matched": "the same treatment; as many flags in every step, on random rollouts of the step.",
    "control: permuted": "the same treatment; as many flags in every group, on random rollouts of the group.",
    "control: prompt_only": "the same treatment; as many flags in every step, on whole groups, those with the most flags first.",
    "control: norm-matched": "the restricted gradient at the length of the whole one: what its direction does by itself.",
    "control: shrunk": "the whole gradient at the length of the restricted one: what a smaller step does by itself.",
    "control: mask never fires": "two blocks without labels, one of them deleted: what blocks, anchors and optimizer do by themselves.",
    "control: anchors only": "the deployed block learns from anchors alone, nothing from rollouts of the joint policy.",
    "control: capacity": "vanilla with the size of two blocks in one.",
    "broken": "as deployed, fewer than half as many usable answers as the base gives: a low hack rate is a loss of ability.",
    "imitation": "part of every group is a teacher's text, so a hack rate is no discovery.",
    "names": "evaluation disclosed another family of marker names than training. A low hack rate there may mean that the model "
             "cannot follow new names rather than that hacking was suppressed; compare with vanilla under the same names.",
    "uses the oracle": "the arm reads the truth while it trains, on purpose; it is a ceiling and no method."}


def notes(arms: list[Arm]) -> list[str]:
    """What a reader must know to read the table right; only what applies."""
    shown = {words for arm in arms for flag in (*flags(arm), arm.block) for words in (flag, flag.split(":")[0])}
    said = ["Shares of hinted evaluation prompts (format: of all prompts), judged by hidden tests. known / held-out: hacks of "
            "loopholes that a mask source may / must not know. attempted: the lever is in the code. lazy: hacked without looking "
            "at the argument. –: not measured.",
            "Intervals below the rates are 95 % Wilson intervals over the evaluation samples of one seed and do not include variation "
            "between seeds; where several seeds are averaged, lowest and highest seed stand there instead.",
            "Δ base: solve minus the base's. last-5: mean over the last five training steps, rollouts as trained."]
    if any(arm.same_policy for arm in arms):
        said.append("= deployed: the adapter has no quarantine, or an empty one; both states are one policy, in one row.")
    if odd := [arm.label for arm in arms if all(run.same_policy for run in arm.runs) and not arm.same_policy]:
        said.append(f"Odd: {', '.join(odd)} has no quarantine, yet its two evaluations differ; they should be equal to the bit.")
    said += [f"{flag}: {meaning}" for flag, meaning in MEANING.items() if flag in shown]
    said += [f"{run.name} collapsed: {run.cause}." for arm in arms for run in arm.runs if run.collapsed]
    codes = sorted({run.code for arm in arms for run in arm.runs})
    if len(codes) > 1 or "+" in codes[0]:
        said.append(f"Code: {', '.join(codes)} (+: uncommitted changes)." + " The rows differ in their code." * (len(codes) > 1))
    return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
