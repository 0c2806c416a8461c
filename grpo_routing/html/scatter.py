"""Two rates against each other, an arm a numbered point: held-out against known hacks, and the Pareto picture of hack against solve."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from grpo_routing.html.material import KINDS, Entry, Material
from grpo_routing.html.svg import down, marker, right, short, tag
from grpo_routing.notes import bases
from grpo_routing.results import BASE, DEPLOYED

TICKS = ((0, "0"), (0.25, ".25"), (0.5, ".5"), (0.75, ".75"), (1, "1"))
RANKED = ("vanilla", "method", "control", "imitation")  # what competes for the front; a reference and an oracle do not
WIDE, HIGH = 600, 500  # pixels that numbers are placed for; they are that or a little less on most screens
SPOTS = ((7, -4), (7, 12), (-8, -4), (-8, 12), (0, -9), (0, 17), (11, 4), (-12, 4))  # where a number may stand beside its point


@dataclass(frozen=True)
class Point:
    """An arm as deployed, or a base where `entry` is None; `seeds` are its runs."""

    entry: Entry | None
    x: float
    y: float
    seeds: tuple[tuple[float, float], ...]

    @property
    def kind(self) -> str:
        return self.entry.kind if self.entry else BASE


def points(material: Material, x: str, y: str) -> list[Point]:
    """Arms of which both rates were measured, on every seed, and the bases behind them."""
    found = [Point(None, arm.mean(BASE, x), arm.mean(BASE, y), ()) for _, arm in bases(material.arms)
             if arm.values(BASE, x) and arm.values(BASE, y)]
    for entry in material.entries:
        seeds = tuple((run.rate(DEPLOYED, x), run.rate(DEPLOYED, y)) for run in entry.arm.runs)
        if not any(None in seed for seed in seeds):
            found.append(Point(entry, entry.arm.mean(DEPLOYED, x), entry.arm.mean(DEPLOYED, y), seeds))
    return found


def front(shown: list[Point]) -> list[Point]:
    """The points that no other one beats with at least as much solve (x) and at most as much hack (y), by solve. Broken arms do not count:
    what answers nothing hacks nothing."""
    able = [point for point in shown if point.kind in RANKED and not point.entry.broken]
    places = {(point.x, point.y) for point in able}
    best = [point for point in able if not any(x >= point.x and y <= point.y for x, y in places - {(point.x, point.y)})]
    return sorted(best, key=lambda point: (point.x, point.y))


def scatter(shown: list[Point], label: str, *, diagonal: bool = False, best: list[Point] | None = None) -> Markup:
    """Both axes from 0 to 1. `best` are joined by steps; `label` is what a screen reader says."""
    parts = []
    for at, word in TICKS:
        parts += [tag("line", x1=right(at), x2=right(at), y1="0", y2="100%", class_="grid"),
                  tag("line", x1="0", x2="100%", y1=down(at), y2=down(at), class_="grid"),
                  tag("text", word, x=right(at), y="100%", dy="1.4em", text_anchor="middle"),
                  tag("text", word, x="-7", y=down(at), dy=".32em", text_anchor="end")]
    if diagonal:
        parts.append(tag("line", x1="0", y1="100%", x2="100%", y2="0", class_="level"))
    if best:
        corners = [(one.x, one.y) for one in best]
        steps = f"M{place(*corners[0])}" + "".join(f"L{place(x, y)}L{place(after, y)}" for (x, _), (after, y) in pairwise(corners))
        parts.append(tag("svg", tag("path", d=steps, class_="line front"), viewBox="0 0 100 100", preserveAspectRatio="none"))
    order = sorted(shown, key=lambda point: point.kind != "control")  # controls lie below
    parts += [dot(point, spot) for point, spot in zip(order, spots(order))]
    return tag("svg", *parts, class_="chart scatter", role="img", aria_label=label)


def place(x: float, y: float) -> str:
    return f"{short(100 * x)} {short(100 * (1 - y))}"


def spots(shown: list[Point]) -> list[tuple[int, int] | None]:
    """Where each number stands beside its point, in pixels; None where there is no room, until the reader points at it."""
    taken = [(WIDE * point.x, HIGH * (1 - point.y)) for point in shown]
    found: list[tuple[int, int] | None] = [None] * len(shown)
    for at in reversed(range(len(shown))):  # what lies on top first
        x, y = taken[at]
        for right_by, down_by in SPOTS:
            here = (x + right_by + (7 if right_by > 0 else -7 if right_by < 0 else 0), y + down_by - 4)
            inside = 4 < here[0] < WIDE - 4 and 4 < here[1] < HIGH - 4  # beside the axes stand their own numbers
            if inside and all(abs(here[0] - a) > 12 or abs(here[1] - b) > 9 for b_at, (a, b) in enumerate(taken) if b_at != at):
                found[at] = (right_by, down_by)
                taken.append(here)
                break
    return found


def dot(point: Point, spot: tuple[int, int] | None) -> Markup:
    """Seeds, spokes to them, the mean and its number."""
    x, y = right(point.x), down(point.y)
    spokes = [tag("line", x1=x, y1=y, x2=right(one), y2=down(two)) for one, two in point.seeds if len(point.seeds) > 1]
    seeds = [tag("circle", cx=right(one), cy=down(two), r="2") for one, two in point.seeds if len(point.seeds) > 1]
    mean = marker(KINDS[point.kind][0], x, y, "mean")
    if point.entry is None:
        return tag("g", tag("title", "untrained base"), mean, class_="point base")
    said = tag("title", f"{point.entry.number}  {point.entry.arm.label}: {point.x:.2f} across, {point.y:.2f} up")
    (dx, dy), hidden = spot or SPOTS[0], "" if spot else "crowded"
    anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
    number = tag("text", str(point.entry.number), x=x, y=y, dx=dx, dy=dy, text_anchor=anchor, class_=hidden or None)
    return tag("g", said, *spokes, *seeds, mean, number, class_=f"point {point.kind}", data_arm=point.entry.number)
