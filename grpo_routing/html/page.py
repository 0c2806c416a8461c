"""Puts report.html together: every section's facts into the templates, styles and script into the page.

The page may load nothing: its Content-Security-Policy names the one script and the one style sheet by their hashes, so even a completion
that slipped through the escaping could neither run nor fetch. The same runs give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import time
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from grpo_routing.analysis import Analysis
from grpo_routing.files import write_atomic
from grpo_routing.html import comparison, curves, failures, paired, provenance, samples, scatter
from grpo_routing.html.headline import COLUMNS, rows
from grpo_routing.html.material import KINDS, Material
from grpo_routing.notes import facts, notes
from grpo_routing.results import ReportError

PAGE = "report.html"


def write_page(material: Material, found: Analysis | ReportError, refresh: int | None = None) -> Path:
    """Write report.html into the experiment's folder; with `refresh` it reloads itself every so many seconds."""
    file = material.folder / PAGE
    write_atomic(file, render(material, found, refresh).encode())
    return file


def render(material: Material, found: Analysis | ReportError, refresh: int | None = None) -> str:
    style, script = (Markup(asset(name)) for name in ("style.css", "script.js"))
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'; form-action 'none'"
    return environment().get_template("page.html").render(
        material=material, style=style, script=script, policy=policy, refresh=refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S") if refresh else None, facts=facts(material.arms),
        notes=notes(material.arms) if material.entries else [], columns=list(COLUMNS), kinds=used(material),
        comparison=comparison.section(found), rates=list(comparison.RATES.values()), **sections(material))


def sections(material: Material) -> dict[str, object]:
    """What each template loops over; a section without content is left out of the page."""
    across, up = scatter.points(material, "hack_known", "hack_held_out"), scatter.points(material, "solve", "hack")
    best = scatter.front(up)
    return {"rows": rows(material), "training": curves.training(material), "quality": curves.quality(material),
            "scales": curves.scales(material), "lanes": paired.lanes(material), "best": best,
            "generalisation": scatter.scatter(across, "held-out hack against known hack, as deployed; the numbers are in the table",
                                              diagonal=True) if any(point.entry for point in across) else None,
            "pareto": scatter.scatter(up, "hack against solve, as deployed; the numbers are in the table", best=best),
            "troubles": failures.troubles(material), "sampled": samples.sampled(material),
            "pedigrees": provenance.pedigrees(material),
            "stray": [provenance.pedigree(material.folder, run) for run in material.unfinished]}


def used(material: Material) -> dict[str, tuple[str, str]]:
    """Kind -> (shape, words) of what the pictures show."""
    there = {entry.kind for entry in material.entries}
    return {kind: look for kind, look in KINDS.items() if kind in there}


def environment() -> Environment:
    made = Environment(loader=PackageLoader("grpo_routing.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)
    made.filters["breakable"] = breakable
    return made


def breakable(label: str) -> Markup:
    """A name that may break behind an underscore, a hyphen and an equals sign."""
    words = str(escape(label))
    for mark in "_-=":
        words = words.replace(mark, f"{mark}<wbr>")
    return Markup(words)


def asset(name: str) -> str:
    return files("grpo_routing.html").joinpath("static", name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """As a Content-Security-Policy writes it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
