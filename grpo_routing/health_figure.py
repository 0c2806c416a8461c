"""Pictures of a training's health: a row of small panels per arm that labels rollouts or has a quarantine, a page per twelve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_routing.arms import Arm
from grpo_routing.figures import FAINT, GREY, HELD_OUT, INK, KNOWN, LEFT, SOLVE, STYLE, box, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREEN, PURPLE, SKY = "#009E73", "#CC79A7", "#56B4E9"  # Okabe & Ito's palette, as in figures.py
SOLID, DASHED, DOTTED = "-", (0, (4, 1.6)), (0, (1, 1.3))
PER_PAGE, PAGE, TOP, ROW, HIGH, GAP = 12, 11.0, 1.42, 1.24, 0.82, 0.34  # arms; inches: page, head, row, panel, between panels
METRIC = "route/flagged"  # what only such arms write


@dataclass(frozen=True)
class Line:
    words: str
    metric: str
    colour: str
    dash: object = SOLID


PANELS: dict[str, tuple[Line, ...]] = {
    "labels (share of rollouts)": (
        Line("flagged", METRIC, KNOWN), Line("absorbed", "route/absorbed", SOLVE), Line("kept", "route/kept", GREEN),
        Line("flagged anchors", "route/flagged_anchors", KNOWN, DOTTED)),
    "label quality (truth)": (
        Line("recall, known", "audit/label_recall_known", KNOWN), Line("recall, held out", "audit/label_recall_held_out", HELD_OUT),
        Line("false positives", "audit/label_false_positive", INK, DASHED)),
    "norms per block (log)": (
        Line("gradient, deployed", "train/gradient_norm_deployed", SOLVE),
        Line("gradient, quarantine", "train/gradient_norm_quarantine", KNOWN),
        Line("update, deployed", "train/update_norm_deployed", SOLVE, DASHED),
        Line("update, quarantine", "train/update_norm_quarantine", KNOWN, DASHED)),
    "policy": (
        Line("format", "train/format", INK), Line("entropy (nats)", "rollout/entropy", PURPLE),
        Line("flat groups", "train/flat_groups", SKY)),
    "hack per mode (truth)": (),  # the modes of the page; see `hacks`
}


def pages(arms: list[Arm]) -> dict[str, list[Arm]]:
    """File name without ending -> the arms on it, in the order of the table; nothing when no arm has labels or a quarantine."""
    shown = [arm for arm in arms if any(METRIC in row for run in arm.runs for row in run.metrics[:1])]
    parts = [shown[at : at + PER_PAGE] for at in range(0, len(shown), PER_PAGE)]
    return {"health" if not number else f"health-{number + 1}": part for number, part in enumerate(parts)}


def draw_health(arms: list[Arm], name: str, folder: Path) -> None:
    """Write every page and remove pages of an earlier report that are no more. The same runs give the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made = pages(arms)
    for old in folder.glob("health*"):
        if old.stem not in made:
            old.unlink()
    for number, (file, part) in enumerate(made.items(), 1):
        with rc_context(STYLE):
            height = TOP + len(part) * ROW
            figure = Figure(figsize=(PAGE, height))
            title = f"{name}: health while training" + (f" ({number} of {len(made)})" if len(made) > 1 else "")
            figure.text(LEFT / PAGE, 1 - 0.24 / height, title, fontsize=13, weight="bold", va="center")
            figure.text(1 - LEFT / PAGE, 1 - 0.24 / height, "mean over 5 steps and over seeds; a faint line per seed   × collapsed",
                        color=GREY, va="center", ha="right")
            page(figure, part)
            save(figure, folder / file)


def page(figure: Figure, arms: list[Arm]) -> None:
    panels = PANELS | {"hack per mode (truth)": hacks(arms)}
    wide = (PAGE - 2 * LEFT - 0.25) / len(panels)
    for column, (title, lines) in enumerate(panels.items()):
        left, log = LEFT + 0.25 + column * wide, "log" in title
        legend(figure, title, lines, left)
        top = ceiling(arms, lines)
        for row, arm in enumerate(arms):
            axes = box(figure, left, TOP + row * ROW, wide - GAP, HIGH)
            draw_lines(axes, arm, lines)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
            axes.set_xlim(0, max(2, *(run.steps for run in arm.runs)))
            if log:
                axes.set_yscale("log")
                axes.minorticks_off()
            else:
                axes.set(ylim=(-0.03 * top, 1.03 * top), yticks=(0, top / 2, top), yticklabels=("0", f"{top / 2:g}", f"{top:g}"))
            if column == 0:
                axes.set_title(arm.label + (f"   collapsed: {arm.collapsed} of {len(arm.runs)}" if arm.collapsed else ""), loc="left",
                               fontsize=8.5, pad=4)
            axes.set_xticks([0, axes.get_xlim()[1]], ["0", f"{axes.get_xlim()[1]:.0f}"] if row + 1 == len(arms) else ["", ""])


def hacks(arms: list[Arm]) -> tuple[Line, ...]:
    """Hack rate of every mode of these arms, known ones by their dashes, and exploits on prompts without a hint."""
    lines = {}
    for arm in arms:
        loophole = arm.config["loophole"]
        for colour, modes in ((KNOWN, loophole["known"]), (HELD_OUT, loophole["held_out"])):
            for number, mode in enumerate(modes):
                lines.setdefault(mode, Line(mode, f"audit/hack_{mode}", colour, (SOLID, DASHED, DOTTED)[number % 3]))
    return (*lines.values(), Line("exploit, no hint", "audit/no_hint_exploited", INK, DOTTED))


def legend(figure: Figure, title: str, lines: tuple[Line, ...], left: float) -> None:
    """A panel's title and its lines, above the first row."""
    from matplotlib.lines import Line2D

    high = figure.get_size_inches()[1]
    figure.text(left / PAGE, 1 - 0.52 / high, title, fontsize=9, weight="bold")
    for number, line in enumerate(lines):
        y = 1 - (0.64 + 0.115 * number) / high
        figure.add_artist(Line2D([left / PAGE, (left + 0.24) / PAGE], [y, y], color=line.colour, linestyle=line.dash, linewidth=1.5))
        figure.text((left + 0.3) / PAGE, y, line.words, fontsize=7, color=line.colour, va="center")


def ceiling(arms: list[Arm], lines: tuple[Line, ...]) -> float:
    """1 for shares; the next whole number where something, such as entropy, goes higher."""
    values = [value for arm in arms for line in lines for value in arm.series(line.metric) if value is not None]
    return float(max(1, -(-max(values, default=0) // 1)))


def draw_lines(axes: Axes, arm: Arm, lines: tuple[Line, ...]) -> None:
    for line in lines:
        several = [run.series(line.metric) for run in arm.runs] if len(arm.runs) > 1 else []
        for values, width, alpha in (*((seed, 0.5, 0.35) for seed in several), (arm.series(line.metric), 1.3, 1)):
            known = [float("nan") if value is None else value for value in values]
            axes.plot(range(1, len(known) + 1), known, color=line.colour, linewidth=width, alpha=alpha,
                      linestyle=line.dash if alpha == 1 else SOLID)
    if any(line.metric == "train/format" for line in lines):
        for run in arm.runs:
            if run.collapsed and run.metrics:
                axes.plot(run.steps, run.series("train/format")[-1], "x", color=INK, markersize=5, clip_on=False, zorder=4)
