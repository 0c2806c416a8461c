"""The headline table: every rate of every arm as trained and as deployed, each seed a dot, base and reference as ticks behind them."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.arms import Arm
from grpo_routing.html.material import KINDS, WORDS, Entry, Material
from grpo_routing.html.svg import marker, right, tag
from grpo_routing.notes import bases, interval, number
from grpo_routing.results import BASE, TRAINED

COLUMNS = {"hack": "hack", "known": "hack_known", "held-out": "hack_held_out", "solve": "solve", "format": "format"}  # column -> rate
LOOKS = {"hack": ("hack", "disc"), "hack_known": ("hack", "disc"), "hack_held_out": ("held", "diamond"), "solve": ("solve", "square"),
         "format": ("ink", "disc")}  # rate -> class, shape


@dataclass(frozen=True)
class Cell:
    """A rate: its number, interval and picture; `sort` is empty where nothing was measured."""

    value: str
    span: str
    sort: str
    picture: Markup | str


@dataclass(frozen=True)
class Row:
    """One policy. `entry` is None for an untrained base."""

    entry: Entry | None
    label: str
    state: str
    policy: str
    seeds: int
    cells: tuple[Cell, ...]

    @property
    def shape(self) -> str:
        return KINDS[self.entry.kind if self.entry else BASE][0]


def rows(material: Material) -> list[Row]:
    """Bases first, then the arms in the order of the text table."""
    found = [Row(None, " ".join(("base", who)).strip(), BASE, WORDS[BASE], len(arm.runs), cells(arm, BASE, None))
             for who, arm in bases(material.arms)]
    for entry in material.entries:
        for state, words in entry.states.items():
            found.append(Row(entry, entry.arm.label, state, words, len(entry.arm.runs), cells(entry.arm, state, entry.reference)))
    return found


def cells(arm: Arm, state: str, reference: Arm | None) -> tuple[Cell, ...]:
    made = []
    for rate in COLUMNS.values():
        value = arm.mean(state, rate)
        picture = "" if value is None else strip(arm, state, rate, reference)
        made.append(Cell(number(value), interval(arm.span(state, rate)), "" if value is None else f"{value:.6f}", picture))
    return tuple(made)


def strip(arm: Arm, state: str, rate: str, reference: Arm | None) -> Markup:
    """From 0 to 1: whisker, a dot per seed, the mean's marker (hollow as trained); dotted tick: base, dashed: reference."""
    (kind, shape), values = LOOKS[rate], arm.values(state, rate)
    low, high = arm.span(state, rate)
    ticks = {"base": arm.mean(BASE, rate) if state != BASE else None, "goal": reference.mean(TRAINED, rate) if reference else None}
    parts = [tag("line", x1="0", x2="100%", y1="50%", y2="50%", class_="rail")]
    parts += [tag("line", x1=right(at), x2=right(at), y1="5%", y2="95%", class_=name) for name, at in ticks.items() if at is not None]
    parts += [tag("line", x1=right(low), x2=right(high), y1="50%", y2="50%", class_="whisker")]
    if len(values) > 1:
        parts += [tag("circle", cx=right(value), cy="50%", r="2.2") for value in values]
    parts.append(marker(shape, right(arm.mean(state, rate)), "50%", "mean hollow" if state == TRAINED else "mean"))
    return tag("svg", *parts, class_=f"strip {kind}", aria_hidden="true")
