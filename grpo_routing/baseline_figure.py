"""Picture of the baselines: known hack, held-out hack and solve over the training, a column per detector."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

from grpo_routing.figures import FAINT, GREY, STYLE, save
from grpo_routing.source_figure import COLOURS, MARKERS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from grpo_routing.by_baseline import Track

RATES = {"hack_known": "known hack", "hack_held_out": "held-out hack", "solve": "solve"}
REFERENCES = {"vanilla": (0, (4, 2)), "no_loophole": (0, (1, 1.5))}  # arm -> dashes; in every panel
COLUMN, ROW = 2.35, 1.7  # inches of a panel
INCHES = 0.062  # of a letter of the legend


def draw(tracks: list[Track], file: Path) -> None:
    """Mean over seeds at the steps that were evaluated, as deployed, every seed a faint line; in grey vanilla and no_loophole. Rows with
    less than half of the most seeds, such as variants that were tried once, are left to the table. A column per detector and a row per
    rate; where no run has a detector, the rates side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    seeds = Counter((track.arm, track.detector) for track in tracks)
    tracks = [track for track in tracks if 2 * seeds[track.arm, track.detector] >= max(seeds.values())]
    detectors = sorted({track.detector for track in tracks if track.arm not in REFERENCES}, key=lambda name: (name == "", len(name)))
    arms = {detector: sorted({track.arm for track in tracks if track.detector == detector} - set(REFERENCES)) for detector in detectors}
    with_detector = sorted({arm for detector in detectors if detector for arm in arms[detector]})
    flat = not with_detector
    across, down = (len(RATES), 1) if flat else (len(detectors), len(RATES))
    with rc_context(STYLE):
        keys = max((len(own) for own in arms.values()), default=1) + len(REFERENCES)
        fitting = int((COLUMN * across + 0.1) / (0.5 + INCHES * max((len(name) for own in arms.values() for name in own), default=12)))
        columns = max(1, min(across, fitting)) if flat else 1  # of the legend
        figure = Figure(figsize=(COLUMN * across + 0.7, ROW * down + 0.9 + 0.15 * -(-keys // columns)))
        wide, high = figure.get_size_inches()
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        if flat:
            axes = axes.T
        figure.subplots_adjust(left=0.6 / wide, right=1 - 0.1 / wide, top=1 - 0.3 / high, bottom=1 - (ROW * down + 0.2) / high,
                               wspace=0.08, hspace=0.1)
        for column, detector in enumerate(detectors):
            names = with_detector if detector else arms[detector]
            for row, rate in enumerate(RATES):
                panel(axes[row][column], [track for track in tracks if track.detector == detector], names, rate)
                references(axes[row][column], tracks, rate)
            axes[-1][column].set_xlabel("step")
            if not flat:
                axes[0][column].set_title(f"detector: {detector}" if detector else "no detector", fontsize=9, loc="left")
            if detector in ("", detectors[0]):
                legend(axes[0 if flat else -1][column], names, flat or detector != "", columns if flat else 2 if detector else 1)
        for row, said in enumerate(RATES.values()):
            if flat:
                axes[row][0].set_title(said, fontsize=9, loc="left")
                axes[row][0].set_xlabel("step")
            else:
                axes[row][0].set_ylabel(said)
        save(figure, file)


def legend(axes: Axes, names: list[str], with_references: bool, columns: int) -> None:
    """Below the panel, from its left edge on."""
    handles = [axes.plot([], [], color=COLOURS[at % 8], marker=MARKERS[at % 8], markersize=4, label=name)[0]
               for at, name in enumerate(names)]
    if with_references:
        handles += [axes.plot([], [], color=GREY, linestyle=dashes, label=name)[0] for name, dashes in REFERENCES.items()]
    place = axes.get_position()
    axes.figure.legend(handles=handles, loc="upper left", frameon=False, fontsize=7.5, ncols=columns,
                       bbox_to_anchor=(place.x0 - 0.01, place.y0 - 0.42 / axes.figure.get_size_inches()[1]))


def panel(axes: Axes, tracks: list[Track], names: list[str], rate: str) -> None:
    axes.set(ylim=(-0.04, 1.04), yticks=(0, 0.5, 1))
    axes.grid(color=FAINT, linewidth=0.7)
    for at, name in enumerate(names):
        own = [track for track in tracks if track.arm == name]
        for track in own:
            axes.plot([point.step for point in track.points], [point.rates["all"][rate] for point in track.points], color=COLOURS[at % 8],
                      linewidth=0.6, alpha=0.25)
        axes.plot(*middle(own, rate), color=COLOURS[at % 8], marker=MARKERS[at % 8], markersize=3.5, linewidth=1.4)


def references(axes: Axes, tracks: list[Track], rate: str) -> None:
    for name, dashes in REFERENCES.items():
        axes.plot(*middle([track for track in tracks if track.arm == name], rate), color=GREY, linestyle=dashes, linewidth=1.2, zorder=1)


def middle(tracks: list[Track], rate: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over the runs that were evaluated there: one that collapsed before is not in it."""
    steps = sorted({point.step for track in tracks for point in track.points})
    return steps, [fmean(point.rates["all"][rate] for track in tracks if (point := track.at(step))) for step in steps]
