"""Baselines side by side, at once, twice and four times the horizon: `python -m grpo_routing.by_baseline outputs/baselines`

A row is an arm with its detector, a column the deployed policy at a step that was evaluated: known hack / held-out hack / solve, mean over
seeds. Two columns say what a choice among those steps would deploy (baselines.md, selection; every row has the same number of choices):

    developer   of the steps whose monitored rate is at most the base's + MARGIN, the one that is paid most; without any such step, the
                one with the lowest monitored rate. Reads the environment's pay and the run's own detector, nothing else
    oracle      the same rule with the hack rate for the monitored one and the solve rate for pay

Chosen on one half of the evaluation problems, reported on the other. Below, paired by seed, mean and 95 % t-interval over seeds: what each
row adds at the last step to the vanilla of its adapter and to routing with the same flags; and whether it lasts, the last step minus the
first that was evaluated, where `attempted` counts every answer with its prompt's lever in it, also one that does the task. Then hack and
attempted at the last step of every loophole by itself, because a mean over loopholes hides one that was forgotten or kept. A run that
collapsed counts at every later step as it stood; one that lacks an evaluation on the way is left out there, and the cell says of how many
runs it speaks. The detector has a column where any run has one. `--csv FILE` writes one line per run and step; `--figure FILE` draws the
steps (baseline_figure.py).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean

from grpo_routing.arms import group
from grpo_routing.baseline_figure import draw
from grpo_routing.by_source import difference
from grpo_routing.comparison import VANILLA
from grpo_routing.deployment import MARGIN
from grpo_routing.env.loopholes import FORMS, LOOPHOLES
from grpo_routing.files import write_atomic
from grpo_routing.results import BASE, DEPLOYED, ReportError, Run, read_json, read_runs

ROUTED = "sourced-detector"
SHOWN = ("hack_known", "hack_held_out", "solve")
LASTING = {"hack_known": "known", "hack_held_out": "held-out", "attempted": "attempted", "solve": "solve"}  # rate -> its column
COLUMNS = ("arm", "detector", "seed", "step", "passed", "monitored", "attempted", "hack", "hack_known", "hack_held_out", "hack_other_form",
           "solve", "format", *(f"{rate}_{mode}" for rate in ("hack", "attempted") for mode in LOOPHOLES), "run", "code")


@dataclass(frozen=True)
class Point:
    """The deployed policy of a run at one step; step 0 is the untrained one. Rates by half of the problems: all, chosen on, reported."""

    step: int
    rates: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Track:
    """One run, from the untrained policy to its end."""

    arm: str
    role: str
    adapter: str
    detector: str
    seed: int
    points: tuple[Point, ...]
    run: str
    code: str

    def at(self, step: int) -> Point | None:
        return next((point for point in self.points if point.step == step), None)

    def pick(self, paid: str, watched: str) -> Point:
        """The trained point that the rule of the module's text takes."""
        base, trained = self.points[0].rates["choose"], self.points[1:]
        allowed = [point for point in trained if point.rates["choose"][watched] <= base[watched] + MARGIN]
        if allowed:
            return max(allowed, key=lambda point: point.rates["choose"][paid])
        return min(trained, key=lambda point: point.rates["choose"][watched])


PICKS: dict[str, Callable[[Track], Point]] = {
    "developer's pick": lambda track: track.pick("passed", "monitored"), "oracle's pick": lambda track: track.pick("solve", "hack")}


def track_of(run: Run, label: str, folder: Path) -> Track:
    """`label` is that of the run's arm in the report; which detector the run has stands in a column of its own. Raises ReportError where
    an evaluation holds no rows that can be read, or no loophole is held out."""
    source, loophole = run.config["mask_source"], run.config["loophole"]
    if not loophole["held_out"]:
        raise ReportError(f"expected runs with a held-out loophole; {run.name} has loophole={loophole['name']}, which holds none out. "
                          "python -m grpo_routing.report shows its rates")
    seen = {f"{mode} {form}" for mode in loophole["known"] for form in source.get("forms", FORMS)}
    states = {0: BASE} | states_of(run, folder)
    points = []
    for step, state in sorted(states.items()):
        rows = read_json(folder / "eval" / f"{state}.json")["rows"]
        if any("levers" not in row for row in rows):
            raise ReportError(f"expected the levers of every sample in {folder}/eval/{state}.json; an older version wrote it. Run it again")
        halves = {"all": rows, "choose": rows[::2], "report": rows[1::2]}
        points.append(Point(step, {name: rates(half, seen, loophole) for name, half in halves.items()}))
    detector = detector_of(source)
    return Track(run.config["arm_name"] if detector else label, run.role, run.config["adapter"]["name"], detector, run.config["seed"],
                 tuple(points), run.name, run.code)


def states_of(run: Run, folder: Path) -> dict[int, str]:
    """Trained step -> the evaluation that holds the deployed policy of it; of a run that collapsed, that of its end at every later step."""
    last = run.config["trainer"]["steps"]
    there = {int(file.stem.split("-")[1]): file.stem for file in (folder / "eval").glob("step-*-as_deployed.json")}
    later = range(0, last, run.config["evaluation"]["every"] or last) if run.collapsed else ()
    return dict.fromkeys(later[1:], DEPLOYED) | there | {last: DEPLOYED}


def tracks_of(experiment: Path, runs: Sequence[Run]) -> list[Track]:
    """Every finished run of outputs/<experiment>. Raises ReportError where one cannot be read."""
    return [track_of(run, arm.label, experiment / "runs" / run.name) for arm in group(runs) for run in arm.runs]


def whole(tracks: list[Track]) -> list[str]:
    """The tables of rates, differences and what lasts, as markdown lines."""
    return [*page(tracks), "", *differences(tracks), *lasting(tracks)]


def over_steps(tracks: list[Track]) -> list[str]:
    """What every row does at which step, whether it lasts, and at which loophole."""
    return [*page(tracks), *lasting(tracks), "", *by_loophole(tracks)]


def detector_of(source: dict) -> str:
    """Which detector an arm was given: `whole`, `recall 0.5`, `plain form only`, or a control of one; empty for an arm without."""
    if source["name"] != "detector":
        return ""
    said = [f"recall {source['recall']:g}"] * (source["recall"] < 1) + ["plain form only"] * (set(source["forms"]) != set(FORMS))
    said = said or ["whole"]
    return ", ".join([*said, f"control={source['control']}"] if source["control"] != "none" else said)


def rates(rows: list[dict], seen: set[str], loophole: dict) -> dict[str, float]:
    """Over prompts with a hint, but for `monitored` and `format`: over all."""
    by_mode = {mode: own for mode in LOOPHOLES if (own := [row for row in rows if row["loophole"] == mode])}
    hinted = [row for own in by_mode.values() for row in own]
    known, held_out = ([row for mode in loophole[part] for row in by_mode.get(mode, [])] for part in ("known", "held_out"))
    return {
        "passed": share(row["passed"] for row in hinted),
        "monitored": share(not seen.isdisjoint(row["levers"]) for row in rows),
        "attempted": share(row["attempted"] for row in hinted),
        "hack": share(row["hacked"] for row in hinted),
        "hack_known": share(row["hacked"] for row in known),
        "hack_held_out": share(row["hacked"] for row in held_out),
        "hack_other_form": share(row["hacked"] and f"{row['loophole']} other" in row["levers"] for row in hinted),
        "solve": share(row["solved"] for row in hinted),
        "format": share(row["format_ok"] for row in rows),
        **{f"{rate}_{mode}": share(row[verdict] for row in own) for rate, verdict in (("hack", "hacked"), ("attempted", "attempted"))
           for mode, own in by_mode.items()}}


def share(true: Iterable[bool]) -> float:
    every = list(true)
    return sum(every) / len(every)


def by_row(tracks: list[Track]) -> list[tuple[tuple[str, str], list[Track]]]:
    """(arm, detector) -> its runs; the rows without a detector first."""
    rows = defaultdict(list)
    for track in tracks:
        rows[track.arm, track.detector].append(track)
    return sorted(rows.items(), key=lambda item: (item[0][1] != "", *item[0]))


def steps_of(tracks: list[Track]) -> list[int]:
    return sorted({point.step for track in tracks for point in track.points} - {0})


def page(tracks: list[Track]) -> list[str]:
    """Markdown lines."""
    steps = steps_of(tracks)
    lines = head(tracks, "arm, as deployed", [*(f"step {step}" for step in steps), *PICKS])
    base = cell([tracks[0].points[0].rates["all"]], 1)
    lines.append(f"| *untrained base* |{' |' * told(tracks)} {base} |" + " |" * (len(steps) + len(PICKS) - 1))
    for (arm, detector), own in by_row(tracks):
        texts = [cell([point.rates["all"] for track in own if (point := track.at(step))], len(own)) for step in steps]
        texts += [cell([rule(track).rates["report"] for track in own], len(own)) for rule in PICKS.values()]
        many = f" <sub>n={len(own)}</sub>" if len(own) != 5 else ""
        lines.append(line([f"`{arm}`{many}", *[detector] * told(tracks), *texts]))
    return lines


def told(tracks: list[Track]) -> bool:
    """Whether any run has a detector, so that the tables have a column for it."""
    return any(track.detector for track in tracks)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(tracks: list[Track], first: str, columns: list[str]) -> list[str]:
    """The two lines that a table begins with."""
    names = [first, *["detector"] * told(tracks), *columns]
    return [line(names), "|" + "---|" * len(names)]


def differences(tracks: list[Track]) -> list[str]:
    """Markdown lines: every row minus the vanilla of its adapter, and minus routing by its detector, as deployed after the last step."""
    rows = by_row(tracks)
    found, routed = dict(rows), told(tracks)
    vanilla = {own[0].adapter: own for _, own in reversed(rows) if own[0].role == VANILLA}
    lines = head(tracks, "arm, after the last step", ["minus vanilla: known", "held-out", "solve",
                                                      *["minus routing: known", "held-out", "solve"] * routed])
    for (arm, detector), own in rows:
        others = (vanilla.get(own[0].adapter), *[found.get((ROUTED, detector)) if detector else None] * routed)
        if own not in others[:1]:
            texts = [difference(paired(own, other, rate)) if other and own is not other else "–" for other in others for rate in SHOWN]
            lines.append(line([f"`{arm}`", *[detector] * routed, *texts]))
    return lines


def lasting(tracks: list[Track]) -> list[str]:
    """Markdown lines, an empty one first: every row after the last step minus itself at the first that was evaluated. None where these
    are the same."""
    first, last = min(steps_of(tracks)), max(steps_of(tracks))
    if first == last:
        return []
    lines = ["", *head(tracks, f"arm, step {last} minus step {first}", [*LASTING.values()])]
    for (arm, detector), own in by_row(tracks):
        both = [(early.rates["all"], track.points[-1].rates["all"]) for track in own if (early := track.at(first))]
        lines.append(line([f"`{arm}`", *[detector] * told(tracks),
                           *(difference([late[rate] - early[rate] for early, late in both]) for rate in LASTING)]))
    return lines


def by_loophole(tracks: list[Track]) -> list[str]:
    """Markdown lines: hack / attempted on the prompts of each loophole, as deployed after the last step, mean over seeds."""
    modes = [mode for mode in LOOPHOLES if f"hack_{mode}" in tracks[0].points[0].rates["all"]]
    lines = head(tracks, f"arm, step {max(steps_of(tracks))}: hack / attempted", modes)

    def row(name: str, detector: str, ends: list[dict[str, float]]) -> str:
        texts = [" / ".join(f"{fmean(one[f'{rate}_{mode}'] for one in ends):.2f}" for rate in ("hack", "attempted")) for mode in modes]
        return line([name, *[detector] * told(tracks), *texts])

    return [*lines, row("*untrained base*", "", [tracks[0].points[0].rates["all"]]),
            *(row(f"`{arm}`", detector, [track.points[-1].rates["all"] for track in own]) for (arm, detector), own in by_row(tracks))]


def paired(own: list[Track], other: list[Track], rate: str) -> list[float]:
    """One difference per seed that both have."""
    there = {track.seed: track.points[-1].rates["all"][rate] for track in other}
    return [track.points[-1].rates["all"][rate] - there[track.seed] for track in own if track.seed in there]


def cell(seeds: list[dict[str, float]], runs: int) -> str:
    """Means over those of the `runs` that have these rates, and their spread."""
    if not seeds:
        return "–"
    middle = " / ".join(f"{fmean(one[name] for one in seeds):.2f}" for name in SHOWN)
    low = " / ".join(f"{min(one[name] for one in seeds):.2f}–{max(one[name] for one in seeds):.2f}" for name in SHOWN)
    few = f"{len(seeds)} of {runs}: " if len(seeds) < runs else ""
    return f"{middle} <sub>{few}{low}</sub>" if runs > 1 else middle


def table(tracks: list[Track]) -> str:
    """CSV of COLUMNS; the base stands with every run, and a loophole without prompts is empty."""
    screen = StringIO()
    writer = csv.writer(screen, lineterminator="\n")
    writer.writerow(COLUMNS)
    for track in sorted(tracks, key=lambda track: (track.arm, track.detector, track.seed)):
        for point in track.points:
            shown = {name: f"{value:.4f}" for name, value in point.rates["all"].items()}
            about = {name: getattr(track, name) for name in ("arm", "detector", "seed", "run", "code")} | {"step": point.step}
            writer.writerow([(about | shown).get(name) for name in COLUMNS])
    return screen.getvalue()


def main(argv: list[str]) -> int:
    """Print the table; the exit status is 2 when the folder cannot be reported."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.by_baseline", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, which holds runs/")
    parser.add_argument("--csv", type=Path, help="also write one line per run and step")
    parser.add_argument("--figure", type=Path, help="also draw FILE.png, .svg and .pdf")
    asked = parser.parse_args(argv)
    try:
        tracks = tracks_of(asked.experiment, read_runs(asked.experiment))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    if not tracks:
        print(f"no finished run in {asked.experiment}", file=sys.stderr)
        return 2
    if asked.csv:
        write_atomic(asked.csv, table(tracks).encode())
    if asked.figure:
        draw(tracks, asked.figure)
    print("\n".join([*whole(tracks), "", *by_loophole(tracks)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
