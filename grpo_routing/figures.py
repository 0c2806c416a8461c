"""The picture of the results: rates of every arm and its training curves. `report.py` says which arms."""

from __future__ import annotations

import textwrap
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_routing.arms import Arm
from grpo_routing.files import write_atomic
from grpo_routing.results import BASE, DEPLOYED, TRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by all common kinds of colour blindness. Warm is hack, blue is solve.
KNOWN, HELD_OUT, SOLVE, INK, GREY, FAINT = "#D55E00", "#E69F00", "#0072B2", "#222222", "#767676", "#E4E4E4"
LANES = {"hack_known": (KNOWN, "o"), "hack_held_out": (HELD_OUT, "D"), "solve": (SOLVE, "o")}  # rate -> colour, marker
PAGE, LABELS, PANEL, LEFT = 9.0, 1.95, 3.25, 0.12  # inches: page, column of names, width of a panel, margin
ARM, HEADING, MULTIPLE = 0.40, 0.27, 1.02  # inches: height of an arm, of a block's heading, of a small multiple
STYLE = {"font.family": "DejaVu Sans", "font.size": 8.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "axes.axisbelow": True,
         "text.color": INK, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": FAINT,
         "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
         "ytick.major.size": 0, "svg.hashsalt": "grpo_routing", "pdf.fonttype": 42}  # 42: fonts that publishers accept


def draw(arms: list[Arm], flags: list[str], name: str, facts: list[str], file: Path) -> None:
    """Write `file` as `save` does: rates of every arm above, training curves below. The same runs give the same bytes.
    `flags` stand below the name of each arm, `facts` below the title."""
    from matplotlib import rc_context  # matplotlib takes a second to import; a refusal should not wait for it
    from matplotlib.figure import Figure

    places, depth = place(arms)
    columns = min(6, max(3, -(-len(arms) // -(-len(arms) // 6))))
    lines = -(-len(arms) // columns)
    top, below = 0.98, 0.98 + depth + 0.95  # inches from the upper edge: first arm, first curves
    height = below + lines * (MULTIPLE + 0.5) - 0.12
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, height))
        figure.text(LEFT / PAGE, 1 - 0.24 / height, name, fontsize=13, weight="bold", va="center")
        figure.text(1 - LEFT / PAGE, 1 - 0.24 / height, "○ as trained   ● as deployed   — 95 % interval, or range over seeds",
                    color=GREY, va="center", ha="right")
        figure.text(LEFT / PAGE, 1 - (top - 0.22) / height, "\n".join(facts), fontsize=7.5, color=GREY, linespacing=1.5)
        panels(figure, arms, flags, places, depth, top)
        multiples(figure, arms, columns, below)
        save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write `file`.png, .svg and .pdf, without the date."""
    for kind, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}}), ("pdf", {"metadata": {"CreationDate": None}})):
        data = BytesIO()
        figure.savefig(data, format=kind, facecolor="white", **options)
        write_atomic(file.with_suffix(f".{kind}"), data.getvalue())


def place(arms: list[Arm]) -> tuple[list[float], float]:
    """Inches below the panel's upper edge of every arm, and of the lower edge; a heading stands above each block."""
    places, depth, block = [], 0.0, ""
    for arm in arms:
        depth += HEADING if arm.block != block else 0
        block = arm.block
        places.append(depth + ARM / 2)
        depth += ARM
    return places, depth


def box(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes by inches from the upper left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))


def panels(figure: Figure, arms: list[Arm], flags: list[str], places: list[float], depth: float, top: float) -> None:
    """Names, hack rates and solve rates side by side; one line of the page per arm."""
    for column, (title, rates) in enumerate({"hack rate": ("hack_known", "hack_held_out"), "solve rate": ("solve",)}.items()):
        axes = box(figure, LEFT + LABELS + column * (PANEL + 0.28), top, PANEL, depth)
        axes.set(xlim=(-0.02, 1.02), ylim=(depth, 0), yticks=[])
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", ".25", ".5", ".75", "1"))
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.text(0, 1, title, transform=shifted(axes, 0, 22), fontsize=9.5, weight="bold")
        for arm, y in zip(arms, places):
            lanes(axes, arm, [rate for rate in rates if arm.values(TRAINED, rate)], y)
        references(axes, arms, places, "hack" if len(rates) > 1 else "solve")
        if column == 0:
            axes.text(0, 1, "● known loopholes", transform=shifted(axes, 62, 22), color=KNOWN)
            axes.text(0, 1, "◆ held out", transform=shifted(axes, 158, 22), color=HELD_OUT)
            names(axes, arms, flags, places)


def shifted(axes: Axes, right: float, up: float):
    """The axes' own coordinates, moved by points."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(right / 72, up / 72, axes.figure.dpi_scale_trans)


def lanes(axes: Axes, arm: Arm, rates: list[str], y: float) -> None:
    """One lane per rate: hollow as trained, solid as deployed, a band between them, a whisker each, a dot per seed."""
    for lane, rate in enumerate(rates):
        at, (colour, marker) = y + (lane - (len(rates) - 1) / 2) * 0.15, LANES[rate]
        states = (DEPLOYED,) if arm.same_policy else (TRAINED, DEPLOYED)
        axes.plot([arm.mean(state, rate) for state in states], [at] * len(states), color=colour, linewidth=3, alpha=0.18)
        for state in states:
            values = arm.values(state, rate)
            axes.plot(arm.span(state, rate), [at, at], color=colour, linewidth=0.9, solid_capstyle="butt")
            if len(values) > 1:
                axes.plot(values, [at] * len(values), marker, color=colour, markersize=2.2, linestyle="none")
            axes.plot(arm.mean(state, rate), at, marker, markersize=5.6 if marker == "o" else 4.8, color=colour, zorder=3,
                      markeredgewidth=1.2, markerfacecolor=colour if state == DEPLOYED else "white", clip_on=False)


def references(axes: Axes, arms: list[Arm], places: list[float], rate: str) -> None:
    """Each arm's own base as a dotted line, and the no-loophole reference of its adapter as a dashed one."""
    known = {arm.setting: arm.mean(TRAINED, rate) for arm in arms if arm.role == "reference"}
    label: dict[str, tuple[float, float]] = {}  # text -> x, y of its first line
    for arm, y in zip(arms, places):
        lines = {"untrained": (arm.mean(BASE, rate), GREY, (1, 1.5))}
        if rate == "solve":
            lines["no loophole"] = (known.get(arm.setting), SOLVE, (4, 2))
        for words, (x, colour, dashes) in lines.items():
            if x is not None:
                axes.plot([x, x], [y - ARM / 2, y + ARM / 2], color=colour, linewidth=1, linestyle=(0, dashes), zorder=1)
                label.setdefault(words, (x, y - ARM / 2))
    near = len(label) == 2 and abs(label["untrained"][0] - label["no loophole"][0]) < 0.3
    for words, (x, y) in label.items():
        left = near and x == min(place[0] for place in label.values())
        axes.annotate(words, (x, 0 if y <= HEADING else y), (0, 5), textcoords="offset points", fontsize=7.5, va="bottom",
                      color=GREY if words == "untrained" else SOLVE, ha=("right" if left else "left") if near else "center")


def names(axes: Axes, arms: list[Arm], flags: list[str], places: list[float]) -> None:
    """Left of the panel: the block's heading, the arm and what is special about it."""
    block, across = "", axes.get_yaxis_transform()
    for arm, special, y in zip(arms, flags, places):
        if arm.block != block:
            block = arm.block
            above = y - (ARM + HEADING) / 2 + 0.03
            axes.text(-LABELS / PANEL, above, block, transform=across, fontsize=7.5, color=GREY, va="center")
        said = f" control={arm.runs[0].control}" if "control:" in special else ""  # once is enough
        name, below = wrapped(arm.label.removesuffix(said), 26), wrapped(special, 38)
        loud, lines = special.startswith(("broken", "collapsed")), name + below
        for number, line in enumerate(lines):
            small, high = number >= len(name), (number - (len(lines) - 1) / 2) * min(0.14, 0.9 * ARM / len(lines))
            axes.text(-LABELS / PANEL, y + high, line, transform=across, va="center",
                      fontsize=7 if small else 9 if len(lines) < 4 else 7.5, color=GREY if small and not loud else INK)


def multiples(figure: Figure, arms: list[Arm], columns: int, top: float) -> None:
    """A small panel of training curves per arm, with the vanilla of its adapter in grey behind it."""
    high = figure.get_size_inches()[1]
    figure.text(LEFT / PAGE, 1 - (top - 0.42) / high, "while training", fontsize=9.5, weight="bold")
    figure.text((LEFT + 1.1) / PAGE, 1 - (top - 0.42) / high, color=GREY, fontsize=7.5,
                s="share of rollouts by training step, mean over 5 steps; grey: hack of the adapter's vanilla")
    width = (PAGE - 2 * LEFT - 0.2) / columns
    for position, arm in enumerate(arms):
        line, column = divmod(position, columns)
        axes = box(figure, LEFT + 0.2 + column * width, top + line * (MULTIPLE + 0.5), width - 0.18, MULTIPLE)
        axes.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1), yticklabels=("0", ".5", "1") if column == 0 else ())
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        title = wrapped(arm.label, 22)[:3]
        axes.set_title("\n".join(title), loc="left", fontsize=8 if len(title) < 3 else 7, pad=3)
        for other in arms:  # the marker family of evaluation, last in a setting, does not touch training
            if other.role == "vanilla" and other.setting[:2] == arm.setting[:2] and other is not arm:
                curve(axes, other, "hack", "#B5B5B5", "", faint=False)
        first, reference = position == 0, arm.role == "reference"  # training prompts of a reference have no hint
        curve(axes, arm, "hack", KNOWN, "hack" if first else "")
        solve, words = ("no_hint_solve", "solve, no hint") if reference else ("solve", "solve" if first else "")
        curve(axes, arm, solve, SOLVE, words)
        axes.set_xticks([0, axes.dataLim.x1], ["0", f"{axes.dataLim.x1:.0f}"])


def curve(axes: Axes, arm: Arm, rate: str, colour: str, words: str, faint: bool = True) -> None:
    """Mean over seeds, with a faint line per seed where there are several; `words` name the line near its end."""
    several = [run.curve(rate) for run in arm.runs] if faint and len(arm.runs) > 1 else []
    for values, width, alpha in (*((seed, 0.6, 0.4) for seed in several), (arm.curve(rate), 1.5, 1)):
        steps, values = range(1, len(values) + 1), [float("nan") if value is None else value for value in values]
        axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, solid_capstyle="round")
    end = [value for value in arm.curve(rate)[-len(steps) * 2 // 5 :] if value is not None]  # what the words stand over
    if words and end:
        high = min(end) > 0.35 and max(end) > 0.7
        axes.annotate(words, (steps[-1], min(end) if high else max(end)), (0, -3 if high else 3), textcoords="offset points",
                      color=colour, fontsize=7.5, ha="right", va="top" if high else "bottom",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.4})


def wrapped(label: str, width: int) -> list[str]:
    """A label in lines; names break behind an underscore."""
    return [line.replace("_ ", "_") for line in textwrap.wrap(label.replace("_", "_ "), width)]
