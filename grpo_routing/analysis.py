"""The comparison of an experiment: every rate of every pair with its interval and corrected p, and the verdicts on what was frozen.

`compare` prints it, the report shows it. What cannot be compared is refused with every reason (comparison.Refused).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_routing.comparison import RATES, Comparison, Experiment, gather
from grpo_routing.outcome import Outcome, outcomes
from grpo_routing.preregistration import Preregistration, edited, read
from grpo_routing.results import ReportError, Run
from grpo_routing.statistics import Interval, gate, holm, interval, sign_flip

WITHIN = 0.1  # solve difference that counts as none


@dataclass(frozen=True)
class Line:
    """One rate of one comparison. `p_corrected` counts the comparisons of the same rate with the same kind of other."""

    pair: Comparison
    rate: str
    difference: Interval
    p: float
    p_corrected: float
    corrected_over: int
    solve_gate: str


@dataclass(frozen=True)
class Analysis:
    """`within` is the solve difference that counts as none; `frozen` is None where no hypothesis was stated before the first run."""

    experiment: Experiment
    pairs: list[Comparison]
    lines: list[Line]
    within: float
    frozen: Preregistration | None
    outcomes: list[Outcome]
    edited: list[str]  # what the YAML says otherwise than the frozen text


def analyse(folder: Path, runs: Sequence[Run], names: list[str] | None = None, loophole: str | None = None, controls: bool = True,
            within: float = WITHIN) -> Analysis:
    """Of the runs of outputs/<experiment>; the arguments as `comparison.gather` and `Experiment.comparisons` have them.

    Raises Refused for what cannot be compared, ReportError for a preregistration that cannot be judged.
    """
    experiment = gather(folder, runs, names, loophole)
    pairs, frozen = experiment.comparisons(controls), read(folder)
    return Analysis(experiment, pairs, lines_of(pairs, within), within, frozen, outcomes(frozen, experiment) if frozen else [],
                    edited(frozen) if frozen else [])


def analysed(folder: Path, runs: Sequence[Run], controls: bool = True) -> Analysis | ReportError:
    """For a page that shows why there is no comparison."""
    try:
        return analyse(folder, runs, controls=controls)
    except ReportError as error:
        return error


def lines_of(pairs: list[Comparison], within: float) -> list[Line]:
    """Every rate of every comparison, in their order."""
    families: dict[tuple[str, str], list[tuple[Comparison, float]]] = defaultdict(list)
    gates = [gate(interval(pair.differences("solve")), within) for pair in pairs]
    for pair in pairs:
        for rate in (rate for rate in RATES if rate in pair.first):
            families[pair.kind, rate].append((pair, sign_flip(pair.differences(rate))))
    corrected = {(id(pair), rate): (p, p_holm, len(members)) for (_, rate), members in families.items()
                 for (pair, p), p_holm in zip(members, holm([p for _, p in members]))}
    return [Line(pair, rate, interval(pair.differences(rate)), *corrected[id(pair), rate], at_solve)
            for pair, at_solve in zip(pairs, gates) for rate in RATES if rate in pair.first]
