"""Leave one loophole out: what every arm does, as deployed, on the loopholes that it was told about and on the one that it was not.

    python -m grpo_routing.by_fold outputs/held_out

A column is a fold, named by what was held out in it; a cell says known hack / held-out hack / solve, the mean over seeds, and below it the
lowest and the highest seed. The untrained policy differs between folds only in which problems count as held out.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from grpo_routing.arms import Arm, group
from grpo_routing.results import BASE, DEPLOYED, ReportError, Run, read_runs

SHOWN = ("hack_known", "hack_held_out", "solve")


def page(runs: Sequence[Run]) -> list[str]:
    """Markdown lines. Raises ReportError where nothing is held out, or two arms would share a cell."""
    rows: dict[str, dict[str, Arm]] = defaultdict(dict)
    for arm in group(list(runs)):
        name, fold = row_of(arm), ", ".join(arm.config["loophole"]["held_out"])
        if not fold:
            raise ReportError(f"expected arms with a held-out loophole; {arm.label} has none (loophole={arm.config['loophole']['name']})")
        if fold in rows[name]:
            raise ReportError(f"two arms are {name} with {fold} held out: {rows[name][fold].label} and {arm.label}. Give each an "
                              "experiment of its own, or look at them with python -m grpo_routing.report")
        rows[name][fold] = arm
    folds = sorted({fold for own in rows.values() for fold in own})
    base = {fold: next(own[fold] for own in rows.values() if fold in own) for fold in folds}
    lines = [f"| arm, as deployed | {' | '.join(f'{fold} held out' for fold in folds)} |", "|---|" + "---|" * len(folds),
             f"| *untrained base* | {' | '.join(cell(base[fold], BASE) for fold in folds)} |"]
    return lines + [f"| {name} | {' | '.join(cell(own[fold], DEPLOYED) if fold in own else '–' for fold in folds)} |"
                    for name, own in rows.items()]


def row_of(arm: Arm) -> str:
    control = arm.runs[0].control
    return f"`{arm.config['arm_name']}`" + (f" <sub>control: {control}</sub>" if control else "")


def cell(arm: Arm, state: str) -> str:
    """Means and ranges; of the untrained policy, which all seeds share, no range."""
    means = " / ".join(f"{arm.mean(state, rate):.2f}" for rate in SHOWN)
    if state == BASE:
        return means
    spans = " / ".join("–".join(f"{end:.2f}"[1:] if end < 1 else f"{end:.2f}" for end in arm.span(state, rate)) for rate in SHOWN)
    return f"{means} <sub>{spans}, n={len(arm.runs)}</sub>"


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_fold", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    try:
        print("\n".join(page(read_runs(parser.parse_args(argv).experiment))))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
