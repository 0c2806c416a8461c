"""Small multiples, an arm a panel: rates while training, the quality of masks, and rates over the quarantine's scale."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from grpo_routing.arms import Arm, carried
from grpo_routing.html.material import Entry, Material
from grpo_routing.html.svg import Line, chart, right, share, steps, tag
from grpo_routing.results import Run, read_json

QUALITY = {  # title -> (words, class, metric)
    "score: AUROC": (("known", "hack", "audit/label_auroc_known"), ("held-out", "held", "audit/label_auroc_held_out")),
    "flags: recall, false positives": (("known", "hack", "audit/label_recall_known"), ("held-out", "held", "audit/label_recall_held_out"),
                                       ("false positives", "ink", "audit/label_false_positive"))}
SCALES = {"hack_known": ("known", "hack"), "hack_held_out": ("held-out", "held"), "solve": ("solve", "solve"),
          "monitored": ("monitored", "grey")}  # rate -> words, class
RULES = {"zero": "zero", "monitor_ucb": "monitor", "oracle": "oracle"}


@dataclass(frozen=True)
class Panel:
    """One small figure, or two below each other; `note` is a line under its name."""

    entry: Entry
    note: str
    charts: tuple[tuple[str, Markup], ...]  # title, picture


def training(material: Material) -> list[Panel]:
    """Hack and solve over the steps, mean and range over seeds, each over five steps; grey is the hack of the setting's vanilla."""
    panels = []
    for entry in material.entries:
        arm, behind = entry.arm, material.vanilla(entry)
        rate, words = ("no_hint_solve", "solve, no hint") if arm.role == "reference" else ("solve", "solve")  # its prompts have no hint
        lines = [Line("", "grey", behind.curve("hack"))] if behind else []
        lines += [banded(arm, "hack", "hack", "hack"), banded(arm, rate, words, "solve")]
        said = ", ".join(f"{line.words} ends at {share(line.end)}" for line in lines if line.words)
        picture = chart(lines, f"{arm.label}: {said}", ("1", f"{steps(lines)} steps"))
        notes = [*entry.warnings, *(["solve: of prompts without a hint"] if arm.role == "reference" else [])]
        panels.append(Panel(entry, ", ".join(notes), (("", picture),)))
    return panels


def banded(arm: Arm, rate: str, words: str, kind: str) -> Line:
    """Mean over seeds with the range from the lowest to the highest."""
    seeds = carried([run.curve(rate) for run in arm.runs])
    measured = [[value for value in values if value is not None] for values in seeds]
    several = len(arm.runs) > 1
    return Line(words, kind, arm.curve(rate), [min(values, default=None) for values in measured] if several else (),
                [max(values, default=None) for values in measured] if several else ())


def quality(material: Material) -> list[Panel]:
    """Arms whose mask was audited (scores.jsonl of oracle/audit.py), against the truth that training never sees."""
    panels = []
    for entry in material.entries:
        if not any((material.folder / "runs" / run.name / "scores.jsonl").exists() for run in entry.arm.runs):
            continue
        charts = []
        for title, wanted in QUALITY.items():
            lines = [Line(words, kind, entry.arm.series(metric)) for words, kind, metric in wanted]
            if any(line.end is not None for line in lines):
                said = ", ".join(f"{line.words} ends at {share(line.end)}" for line in lines)
                picture = chart(lines, f"{entry.arm.label}, {title}: {said}", ("1", f"{steps(lines)} steps"),
                                level=0.5 if "AUROC" in title else None)
                charts.append((title, picture))
        if charts:
            panels.append(Panel(entry, "", tuple(charts)))
    return panels


def scales(material: Material) -> list[Panel]:
    """Every run with a deploy.json (`python -m grpo_routing.deploy`), on the report set."""
    return [Panel(entry, f"seed {run.config['seed']}, {said['report']['base']['asked']} problems", (("", over_scale(run, said)),))
            for entry in material.entries for run in entry.arm.runs
            if (said := read_json(material.folder / "runs" / run.name / "deploy.json"))]


def over_scale(run: Run, said: dict) -> Markup:
    """Rates from scale 0 to 1, the monitor's limit, and where each rule would stand."""
    curve = said["report"]["curve"]
    measured = {name: [row[name] for row in curve] for name in SCALES if any(row[name] is not None for row in curve)}
    bounds = {"monitored": {"low": measured["monitored"], "high": [row["bound"] for row in curve]}}
    lines = [Line(*SCALES[name], values, **bounds.get(name, {})) for name, values in measured.items()]
    stands: dict[float, list[str]] = {}
    for rule, pick in said["picks"].items():
        if pick["scale"] is not None:
            stands.setdefault(pick["scale"], []).append(RULES[rule])
    marks = [tag("line", x1=right(scale), x2=right(scale), y1="0", y2="100%", class_="pick") for scale in stands]
    for scale, rules in stands.items():
        anchor = "start" if scale < 0.3 else "end" if scale > 0.7 else "middle"
        marks.append(tag("text", ", ".join(rules), x=right(scale), y="0", dy="-.5em", text_anchor=anchor))
    words = ", ".join(f"{line.words} from {share(line.values[0])} to {share(line.end)}" for line in lines)
    return chart(lines, f"{run.name}, quarantine off to on: {words}", ("scale 0", "1"), level=said["limit"], marks=marks)
