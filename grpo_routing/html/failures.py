"""Health: runs that collapsed, failed or are not over, each with its cause."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.html.material import Material
from grpo_routing.html.svg import Line, chart, share
from grpo_routing.results import Run, read_json

OVER = ("done", "collapsed", "failed")  # what no run leaves by itself
EXPLAINED = {
    "collapsed": "the tripwire stopped it (health.py); it counts in its arm as it stood",
    "failed": "ended by an error; the same command resumes it",
    "running": "at work, or its process died without a word", "stopped": "asked to stop, with a checkpoint; the same command resumes it",
    "new": "planned, not started", "incomplete": "says that it is done, but files are missing"}
LAST_LINES = 14  # of a traceback


@dataclass(frozen=True)
class Trouble:
    """`picture` is train/format until the end of a collapsed run, `trace` the end of a failed one's traceback."""

    run: Run
    planned: int | None
    picture: Markup | str
    trace: str

    @property
    def meaning(self) -> str:
        return EXPLAINED[self.run.status]


def troubles(material: Material) -> list[Trouble]:
    """Every run that is not done, the collapsed first."""
    order = list(EXPLAINED)
    odd = sorted((run for run in material.runs if run.status != "done"), key=lambda run: (order.index(run.status), run.name))
    return [trouble(material, run) for run in odd]


def trouble(material: Material, run: Run) -> Trouble:
    said = read_json(material.folder / "runs" / run.name / "status.json") or {}
    trace = "\n".join(said["traceback"].rstrip().splitlines()[-LAST_LINES:]) if said.get("traceback") else ""
    return Trouble(run, run.config["trainer"]["steps"] if run.config else None, fall(run) if run.collapsed else "", trace)


def fall(run: Run) -> Markup | str:
    """Share of usable answers, and the least that the tripwire lets pass."""
    lines = [Line("format", "ink", run.series("train/format"))]
    if lines[0].end is None:
        return ""
    least = run.config["health"]["least_format"] if "health" in run.config else None
    return chart(lines, f"usable answers of {run.name} fall to {share(lines[0].end)}", ("1", f"step {run.steps}"), level=least)


def finished(material: Material) -> bool:
    """Whether nothing is left to wait for."""
    return all(run.status in OVER for run in material.runs)
