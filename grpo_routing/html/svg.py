"""Charts as strings of SVG, without a library: places are percentages, so a chart fills its box at any width and its text never shrinks.

An <svg> without viewBox takes percentages as coordinates; lines, which do not, stand in a nested one that is stretched, with strokes that
are not. Colours, dashes and sizes are classes of style.css, so that one picture serves light, dark and print. What a colour says, a
marker or a dash says again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

POINTS = 90  # of a line; a chart is a few hundred pixels wide
SHAPES = {"hack": "disc", "held": "diamond", "solve": "square", "ink": "cross", "grey": "triangle"}  # kind of a line -> shape at its end
Values = Sequence[float | None]


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """One element. `class_` is class, stroke_width is stroke-width; None leaves an attribute out; text is escaped."""
    said = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value is not None)
    body = "".join(escape(part) for part in inside)
    return Markup(f"<{name}{said}>{body}</{name}>" if body else f"<{name}{said}/>")


def short(number: float) -> str:
    """One decimal, no trailing zero."""
    return f"{number:.1f}".removesuffix(".0")


def right(value: float) -> str:
    """A share as a place from the left."""
    return f"{short(100 * value)}%"


def down(value: float) -> str:
    """A share as a place from the top."""
    return f"{short(100 * (1 - value))}%"


def thinned(count: int) -> list[int]:
    """At most POINTS places of so many, first and last among them."""
    if count <= POINTS:
        return list(range(count))
    return [round(at * (count - 1) / (POINTS - 1)) for at in range(POINTS)]


def marker(shape: str, x: str, y: str, words: str, shift: str | None = None) -> Markup:
    """A shape that page.html defines once: disc, diamond, square, triangle, cross, star or plus. `shift` is a transform in pixels."""
    return tag("use", href=f"#{shape}", x=x, y=y, class_=words, transform=shift)


@dataclass(frozen=True)
class Line:
    """A curve over the steps: `kind` is its class, `low` and `high` its band."""

    words: str
    kind: str
    values: Values
    low: Values = ()
    high: Values = ()

    @property
    def end(self) -> float | None:
        """The last value that was measured."""
        return next((value for value in reversed(self.values) if value is not None), None)


def drawn(line: Line, width: int) -> list[Markup]:
    """Band and curve in the stretched coordinates 0 to 100, of `width` steps. A step that was not measured breaks both."""
    def place(at: int, value: float) -> str:
        return f"{short(100 * at / max(1, width - 1))} {short(100 * (1 - value))}"

    shown = thinned(len(line.values))
    parts = []
    if line.low:
        pieces = runs_of([at for at in shown if line.low[at] is not None], shown)
        edges = [[*(place(at, line.high[at]) for at in piece), *(place(at, line.low[at]) for at in reversed(piece))] for piece in pieces]
        outline = "".join(f"M{'L'.join(edge)}Z" for edge in edges)
        parts += [tag("path", d=outline, class_=f"band {line.kind}")] if outline else []
    pieces = runs_of([at for at in shown if line.values[at] is not None], shown)
    curve = "".join("M" + "L".join([place(at, line.values[at]) for at in piece] * (2 if len(piece) == 1 else 1)) for piece in pieces)
    return [*parts, tag("path", d=curve, class_=f"line {line.kind}")] if curve else parts


def runs_of(kept: list[int], places: list[int]) -> list[list[int]]:
    """What is kept of the places, in stretches without a gap."""
    order, stretches = {place: at for at, place in enumerate(places)}, []
    for place in kept:
        if stretches and order[place] == order[stretches[-1][-1]] + 1:
            stretches[-1].append(place)
        else:
            stretches.append([place])
    return stretches


def steps(lines: Sequence[Line]) -> int:
    """How far the longest of them goes."""
    return max((len(line.values) for line in lines), default=1)


def chart(lines: Sequence[Line], label: str, ends: tuple[str, str], *, level: float | None = None, marks: Sequence[Markup] = ()) -> Markup:
    """Shares over steps. `ends` are the words below the axis's two ends, `level` a dotted line, `label` what a screen reader says."""
    width = steps(lines)
    grid = [tag("line", x1="0", x2="100%", y1=down(tick), y2=down(tick), class_="grid") for tick in (0, 0.5, 1)]
    ticks = [tag("text", word, x="-6", y=down(tick), dy=".32em", text_anchor="end") for tick, word in ((0, "0"), (0.5, ".5"), (1, "1"))]
    ticks += [tag("text", word, x=x, y="100%", dy="1.35em", text_anchor=anchor)
              for word, x, anchor in ((ends[0], "0", "start"), (ends[1], "100%", "end"))]
    across = [] if level is None else [tag("line", x1="0", x2="100%", y1=down(level), y2=down(level), class_="level")]
    inner = tag("svg", *(part for line in lines for part in drawn(line, width)), viewBox="0 0 100 100", preserveAspectRatio="none")
    return tag("svg", *grid, *across, inner, *marks, *ticks, *end_words(lines), class_="chart", role="img", aria_label=label)


def end_words(lines: Sequence[Line]) -> list[Markup]:
    """The last value of each line beside its end, behind the line's shape; moved apart where they would overlap."""
    named = sorted((line for line in lines if line.words and line.end is not None), key=lambda line: -line.end)
    placed: list[float] = []
    for line in named:
        placed.append(min(line.end, placed[-1] - 0.13) if placed else line.end)
    lift = max(0.0, -min(placed, default=0.0))
    ends = [(line, down(min(1.0, y + lift))) for line, y in zip(named, placed)]
    return [part for line, y in ends for part in (
        marker(SHAPES[line.kind], "100%", y, f"mean {line.kind}", "translate(8)"),
        tag("text", share(line.end), x="100%", dx="15", y=y, dy=".32em", class_="end"))]


def share(value: float | None) -> str:
    """.95, 1.0, –"""
    return "–" if value is None else f"{value:.2f}".removeprefix("0") if value < 0.995 else f"{value:.1f}"
