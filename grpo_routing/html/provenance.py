"""Where every number comes from: run folder, code, machine, and the command that runs it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grpo_routing.html.material import Entry, Material
from grpo_routing.results import Run


@dataclass(frozen=True)
class Pedigree:
    """One run; texts are empty where the run did not say."""

    run: Run
    code: str
    machine: str
    started: str
    versions: str
    command: str

    @property
    def seed(self) -> str:
        return str(self.run.config["seed"]) if self.run.config else ""


def pedigrees(material: Material) -> list[tuple[Entry, list[Pedigree]]]:
    return [(entry, [pedigree(material.folder, run) for run in entry.arm.runs]) for entry in material.entries]


def pedigree(experiment: Path, run: Run) -> Pedigree:
    said = run.provenance or {}
    started = datetime.fromtimestamp(said["started"], UTC).strftime("%Y-%m-%d %H:%M UTC") if "started" in said else ""
    versions = ", ".join(f"{name} {version}" for name, version in said.get("versions", {}).items())
    return Pedigree(run, run.code or "", said.get("host", ""), started, versions, command(experiment / "runs" / run.name, run))


def command(folder: Path, run: Run) -> str:
    """From a checkout of the repository: its code, then its frozen config, into outputs/rerun so that both can be compared."""
    if not run.config:
        return ""
    place = shlex.quote(str(folder)) if folder.is_absolute() else f'"$PWD"/{shlex.quote(str(folder))}'
    words = [f"python -m grpo_routing --config-path {place} --config-name config",
             "experiment_name=rerun output=outputs hydra.run.dir=outputs/hydra"]
    if run.provenance and run.provenance["commit"] != "not in git":
        if run.provenance["diff"]:  # the run wrote down what was not committed
            reader = "import json, sys; print(json.load(open(sys.argv[1]))['diff'])"
            words.insert(0, f"python -c {shlex.quote(reader)} {shlex.quote(str(folder / 'provenance.json'))} | git apply -")
        words.insert(0, f"git checkout {run.provenance['commit']}")
    return "\n".join([*words[:-2], f"{words[-2]} \\\n    {words[-1]}"])
