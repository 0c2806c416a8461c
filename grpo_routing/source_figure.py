"""Pictures of mask sources: what routing by them does (`draw`), and how good their masks were over a training (`draw_quality`)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from grpo_routing.figures import FAINT, GREY, HELD_OUT, INK, KNOWN, SOLVE, STYLE, save
from grpo_routing.results import BASE, DEPLOYED, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grpo_routing.by_source import Cell
    from grpo_routing.diagnosis import Quality

# Okabe & Ito's palette and a marker of its own per source, so that neither colour nor shape alone carries the difference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLUMN, ROW = 2.75, 2.75  # inches of a panel


def draw(cells: list[Cell], file: Path) -> None:
    """Solve against held-out hack as deployed, a panel per held-out loophole. Every seed a small dot; the mean of a source is a large one,
    that of its rate-matched control hollow, with a line between them. Down and to the right is better."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    loopholes = sorted({cell.loophole for cell in cells})
    names = sorted({cell.row[0] for cell in cells if cell.row[1] == "none"})
    with rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, COLUMN * len(loopholes) + 0.9), ROW + 0.35 + 0.19 * -(-(len(names) + 2) // 3)))
        wide, high = figure.get_size_inches()
        axes = figure.subplots(1, len(loopholes), sharex=True, sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.6 / wide, right=0.99, top=1 - 0.3 / high, bottom=1 - (ROW - 0.05) / high,
                               wspace=0.08)
        for at, mode in enumerate(loopholes):
            panel(axes[at], [cell for cell in cells if cell.loophole == mode], names)
            axes[at].set_title(f"{mode} held out", fontsize=9, loc="left")
        axes[0].set_ylabel("held-out hack, as deployed")
        handles = [axes[0].plot([], [], MARKERS[i % 8], color=COLOURS[i % 8], label=name, markersize=5)[0] for i, name in enumerate(names)]
        handles.append(axes[0].plot([], [], "o", mfc="white", mec=GREY, label="hollow: rate-matched control", markersize=5)[0])
        handles.append(axes[0].plot([], [], "+", color=INK, label="untrained base", markersize=8)[0])
        figure.legend(handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=7.5, bbox_to_anchor=(0.03, 0.0))
        save(figure, file)


def panel(axes: Axes, cells: list[Cell], names: list[str]) -> None:
    axes.set(xlim=(-0.03, 0.75), ylim=(-0.04, 1.04), xlabel="solve, as deployed")
    axes.grid(color=FAINT, linewidth=0.7)
    for i, name in enumerate(names):
        colour, marker, middles = COLOURS[i % 8], MARKERS[i % 8], {}
        for control in ("none", "rate_matched"):
            own = [cell.rates[DEPLOYED] for cell in cells if cell.row == (name, control)]
            if own:
                middles[control] = fmean(r["solve"] for r in own), fmean(r["held_out"] for r in own)
                axes.plot([r["solve"] for r in own], [r["held_out"] for r in own], marker, color=colour, markersize=2.5, alpha=0.35, mew=0)
        if len(middles) == 2:
            axes.plot(*zip(*middles.values()), color=colour, linewidth=0.9, alpha=0.6)
        for control, place in middles.items():
            axes.plot(*place, marker, markersize=6.5, mec=colour, mfc=colour if control == "none" else "white")
    base = cells[0].rates[BASE]
    axes.plot(base["solve"], base["held_out"], "+", color=INK, markersize=9, mew=1.5)


def draw_quality(qualities: list[Quality], file: Path) -> None:
    """A row per arm: AUROC over the steps, recall and false positives over the steps, and the scores of hacks and clean rollouts in the
    first and the last third."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heads = ("AUROC of the score", "recall and false positives", "scores, first third", "scores, last third")
    with rc_context(STYLE):
        figure = Figure(figsize=(10.2, 0.9 + 1.45 * len(qualities)))
        high = figure.get_size_inches()[1]
        axes = figure.subplots(len(qualities), 4, squeeze=False)
        figure.subplots_adjust(left=0.2, right=0.99, top=1 - 0.42 / high, bottom=0.55 / high, hspace=0.42, wspace=0.16)
        for row, quality in enumerate(qualities):
            box = axes[row][0].get_position()
            figure.text(0.01, (box.y0 + box.y1) / 2, quality.label.replace(" ", "\n"), va="center", fontsize=8)
            curves(axes[row][0], {KNOWN: quality.series["auroc_known"], HELD_OUT: quality.series["auroc_held_out"]})
            axes[row][0].axhline(0.5, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)))
            curves(axes[row][1], {KNOWN: quality.series["recall_known"], HELD_OUT: quality.series["recall_held_out"],
                                  INK: quality.series["false_positive"]})
            for column, scores in ((2, quality.early), (3, quality.late)):
                histogram(axes[row][column], scores)
            if row == 0:
                for column, head in enumerate(heads):
                    axes[0][column].set_title(head, fontsize=8.5, loc="left")
        meanings = {"hacks on known loopholes": KNOWN, "hacks on held-out ones": HELD_OUT, "clean rollouts, in histograms": SOLVE,
                    "false positives": INK}
        handles = [axes[0][0].plot([], [], color=colour, label=words)[0] for words, colour in meanings.items()]
        figure.legend(handles=handles, loc="lower right", ncols=4, frameon=False, fontsize=7.5)
        save(figure, file)


def curves(axes: Axes, lines: dict[str, list[float | None]]) -> None:
    """colour -> value per step, each the mean over the last five."""
    axes.set(ylim=(-0.04, 1.04), yticks=(0, 0.5, 1))
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    for colour, values in lines.items():
        axes.plot([float("nan") if value is None else value for value in smooth(values)], color=colour, linewidth=1.2)


def histogram(axes: Axes, scores: dict[str, list[float]]) -> None:
    """Each kind as a density of its own; the kinds differ in number."""
    axes.set(yticks=[])
    every = [value for values in scores.values() for value in values]
    if not every or min(every) == max(every):
        return
    span = (min(every), max(every))
    for kind, colour in (("clean", SOLVE), ("hack, known", KNOWN), ("hack, held out", HELD_OUT)):
        if scores[kind]:
            axes.hist(scores[kind], bins=24, range=span, density=True, histtype="step", color=colour, linewidth=1.2)


def by_kind(rows: list[dict], held_out: list[str]) -> dict[str, list[float]]:
    """Scores of judged rollouts by what they are; an exploit that failed is neither."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for score, hacked, exploited, loophole in zip(row["score"], row["hacked"], row["exploited"], row["loophole"]):
            if score is not None and (hacked or not exploited):
                kind = "clean" if not hacked else "hack, held out" if loophole in held_out else "hack, known"
                found[kind].append(score)
    return {kind: found[kind] for kind in ("clean", "hack, known", "hack, held out")}
