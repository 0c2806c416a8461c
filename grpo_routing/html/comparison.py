"""The comparison on the page: differences with their intervals, verdicts on frozen hypotheses, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.analysis import Analysis, Line
from grpo_routing.comparison import CONTROL, Refused
from grpo_routing.html.svg import marker, right, tag
from grpo_routing.outcome import Outcome
from grpo_routing.results import ReportError

RATES = {"hack_known": "known hack", "hack_held_out": "held-out hack", "solve": "solve"}
SHOWN = 5  # reasons of a refusal


@dataclass(frozen=True)
class Cell:
    """One rate's difference, arm minus the other, in [-1, 1], with its 95 % interval and Holm-corrected p."""

    line: Line

    @property
    def words(self) -> str:
        found = self.line.difference
        return f"{found.low:+.2f} to {found.high:+.2f}" if found.low > float("-inf") else "one seed"

    @property
    def picture(self) -> Markup:
        """The interval on an axis from -1 to 1, with zero in the middle."""
        found = self.line.difference
        low, here, high = (right((max(-1.0, min(1.0, value)) + 1) / 2) for value in (found.low, found.mean, found.high))
        return tag("svg", tag("line", x1="0", x2="100%", y1="50%", y2="50%", class_="rail"),
                   tag("line", x1="50%", x2="50%", y1="0", y2="100%", class_="goal"),
                   tag("line", x1=low, x2=high, y1="50%", y2="50%", class_="whisker"), marker("disc", here, "50%", "mean"),
                   class_="strip ink", aria_hidden="true")


@dataclass(frozen=True)
class Row:
    """One pair: an arm and what it stands against, a cell per rate; None where the pair has no such problem."""

    arm: str
    against: str
    seeds: int
    cells: list[Cell | None]
    solve_gate: str


@dataclass(frozen=True)
class Section:
    """`refused` has at most SHOWN reasons; `unsaid` counts the others."""

    rows: list[Row]
    outcomes: list[Outcome]
    within: float = 0.0  # the solve difference that counts as none
    registered: str = ""  # when and under what hash the hypotheses were frozen
    edited: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    unsaid: int = 0


def section(found: Analysis | ReportError) -> Section:
    if isinstance(found, ReportError):
        reasons = tuple(found.reasons) if isinstance(found, Refused) else (str(found),)
        return Section([], [], refused=reasons[:SHOWN], unsaid=max(0, len(reasons) - SHOWN))
    lines = {(id(line.pair), line.rate): line for line in found.lines}
    rows = []
    for pair in found.pairs:
        own = [lines.get((id(pair), rate)) for rate in RATES]
        against = f"control: {pair.versus.runs[0].control}" if pair.kind == CONTROL else pair.against
        rows.append(Row(pair.arm.label, against, len(pair.seeds), [line and Cell(line) for line in own], own[-1].solve_gate))
    frozen = found.frozen
    return Section(rows, found.outcomes, found.within, f"{frozen.registered}, hash {frozen.hash}" if frozen else "", tuple(found.edited))
