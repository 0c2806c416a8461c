"""What the files of an experiment say: its runs, their rates and their curves. arms.py puts the seeds of a recipe together.

A run that is not finished keeps its state and the cause. What was not measured is None, never 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import yaml

from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.older import completed

BASE, TRAINED, DEPLOYED = STATES = ("base", "as_trained", "as_deployed")
RATES = ("hack", "hack_known", "hack_held_out", "attempted", "solve", "format", "lazy", "no_hint_solve", "no_hint_exploited")
GROUPS = ("adapter", "projection", "mask_source", "advantage", "prompt", "sampling", "extra_rollouts")
FIELDS = ("arm", "seed", "loophole", "state", *RATES, "last5_hack", "last5_solve", "steps", "samples", "samples_known",
          "samples_held_out", "samples_all", "run", "status", "cause", "role", "imitation", "uses_oracle", "same_policy", *GROUPS,
          "pays", "train_family", "evaluation_family", "commit", "code")  # keys of a JSON object, in order
NO_LABELS = ("none", "trusted_subspace")  # mask sources that never mark whole rollouts; others do, but for `level: gradient`
RESTRICTED = {("restricted", "whole"): "norm-matched", ("whole", "restricted"): "shrunk"}  # (direction, length) of projection=restrict
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # eight times as fast, where libyaml is there
LAST = 5  # training steps behind last5_* and behind every point of a training curve


class ReportError(ValueError):
    """The folder cannot be reported; the message says what was expected, what came and what to do."""


def flat_objects(runs: Sequence[Run]) -> list[dict]:
    """FIELDS, then hack_<mode> of every mode that some run evaluated; null is what was not measured."""
    objects = [row for run in runs for row in run.objects()]
    modes = sorted({key for row in objects for key in row} - set(FIELDS))
    return [{key: row.get(key) for key in (*FIELDS, *modes)} for row in objects]


def smooth(values: list[float | None]) -> list[float | None]:
    """Each the mean over the LAST values up to it."""
    return [mean(values[max(0, step - LAST) : step]) for step in range(1, len(values) + 1)]


def mean(values: list[float | None]) -> float | None:
    """Mean of what was measured; None when nothing was."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None


@dataclass(frozen=True)
class Evaluation:
    """One eval/<state>.json: shares, and the number of judged samples behind each."""

    rates: dict[str, float | None]
    samples: dict[str, int]

    @staticmethod
    def of(rates: dict[str, float | None], drawn: list[str], known: list[str], held_out: list[str]) -> Evaluation:
        """`drawn` is the loophole of every sample; the counts follow the definitions of oracle/summary.py."""
        plain = drawn.count(NO_LOOPHOLE)
        samples = dict.fromkeys(RATES, len(drawn) - plain) | {f"hack_{mode}": drawn.count(mode) for mode in (*known, *held_out)}
        samples |= {"format": len(drawn), "no_hint_solve": plain, "no_hint_exploited": plain,
                    "hack_known": sum(map(drawn.count, known)), "hack_held_out": sum(map(drawn.count, held_out))}
        return Evaluation(rates, samples)


@dataclass(frozen=True)
class Run:
    """One run folder. `config` is None until the run has frozen it; `cause` says why a run is not finished."""

    name: str
    config: dict | None
    status: str  # done, collapsed, failed, running, stopped, new; or incomplete: said to be done, but files or steps are missing
    cause: str | None
    evaluations: dict[str, Evaluation]
    metrics: list[dict]
    audit: list[dict]
    provenance: dict | None

    @property
    def finished(self) -> bool:
        """Whether the run counts in its arm: a collapsed one does too, or only the arms' survivors would be compared."""
        return self.status == "done" or (self.collapsed and self.evaluations.keys() == set(STATES))

    @property
    def collapsed(self) -> bool:
        return self.status == "collapsed"

    @property
    def steps(self) -> int:
        """Training steps done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def same_policy(self) -> bool | None:
        """Whether as_trained and as_deployed are one policy: no quarantine, or one that is zero. None before any step."""
        key = "train/norm_quarantine"  # absent where the adapter has none
        return key not in self.metrics[-1] or self.metrics[-1][key] == 0 if self.metrics else None

    @property
    def uses_oracle(self) -> bool:
        """`uses_oracle: true` at the top or in a group, or the mask source `ceiling`, which is the truth by definition."""
        nodes = [self.config, *(node for node in self.config.values() if isinstance(node, dict))]
        said = any("uses_oracle" in node and node["uses_oracle"] for node in nodes)
        return said or self.config["mask_source"]["name"] == "ceiling"

    @property
    def role(self) -> str:
        """vanilla, method, control, imitation or reference: place and label of the row."""
        name = {kind: self.config[kind]["name"] for kind in GROUPS}
        if not self.config["loophole"]["pays"]:
            return "reference"
        if self.control:
            return "control"
        if name["projection"] != "measure_only":
            return "method"
        if name["extra_rollouts"] == "teacher":
            return "imitation"
        plain = (name["extra_rollouts"] == "none" and name["prompt"] == name["sampling"] == "plain"
                 and name["advantage"] in ("dr_grpo", "grpo"))
        return "vanilla" if plain and not self.labels and not self.uses_oracle else "method"

    @property
    def labels(self) -> bool:
        """Whether the mask source marks whole rollouts; its labels reach training through advantage and anchors too."""
        source = self.config["mask_source"]
        return source["name"] not in NO_LABELS and ("level" not in source or source["level"] == "rollout")

    @property
    def mask_control(self) -> str:
        """The negative control that stands in for the mask source, or none."""
        source = self.config["mask_source"]
        return "none" if source["name"] == "none" else source["control"]

    @property
    def control(self) -> str | None:
        """What this control lacks or has instead; None when the run is no control. MEANING in notes.py explains each."""
        projection, source = self.config["projection"], self.config["mask_source"]["name"]
        if self.mask_control != "none" and (projection["name"] != "measure_only" or self.labels):
            return self.mask_control
        if self.config["sampling"]["name"] != "plain" and self.config["sampling"]["control"] != "none":
            return self.config["sampling"]["control"]
        if projection["name"] == "restrict" and (kept := (projection["direction"], projection["length"])) in RESTRICTED:
            return RESTRICTED[kept]
        if projection["name"] in ("route", "stop_gradient") and source == "none":
            return "mask never fires"
        if "mode" in projection and projection["mode"] == "custom" and projection["clean"][0] == 0:
            return "anchors only"  # no rollout of the joint policy trains the deployed block
        return "capacity" if self.config["arm_name"] == "vanilla_wide" else None  # a rank alone does not say what it is for

    @property
    def code(self) -> str | None:
        """Commit plus a mark of what was not committed; two runs of one code have the same."""
        if self.provenance is None:
            return None
        diff = self.provenance["diff"]
        return self.provenance["commit"][:10] + (f"+{sha256(diff.encode()).hexdigest()[:6]}" if diff else "")

    def rate(self, state: str, name: str) -> float | None:
        return self.evaluations[state].rates[name] if state in self.evaluations else None

    def curve(self, name: str) -> list[float | None]:
        """audit/<name> per training step, each the mean over the LAST steps up to it that had such rollouts."""
        return smooth([row[f"audit/{name}"] for row in self.audit])

    def series(self, metric: str) -> list[float | None]:
        """The same of any metric that log.py declares; None where a run does not write it."""
        return smooth([row.get(metric) for row in (self.audit if metric.startswith("audit/") else self.metrics)])

    def last(self, name: str) -> float | None:
        """The end of the curve: the mean over the last five training steps."""
        return self.curve(name)[-1] if self.audit else None

    def objects(self) -> list[dict]:
        """What is known of each state, as in results.json. The base has 0 steps: it is the policy before training."""
        about = {"run": self.name, "status": self.status, "cause": self.cause, "code": self.code}
        about |= {"commit": self.provenance["commit"]} if self.provenance else {}
        if self.config:
            loophole = self.config["loophole"]
            about |= {"arm": self.config["arm_name"], "seed": self.config["seed"], "loophole": loophole["name"], "role": self.role}
            about |= {key: loophole[key] for key in ("pays", "train_family", "evaluation_family")}
            about |= {kind: self.config[kind]["name"] for kind in GROUPS}
            about |= {"imitation": about["extra_rollouts"] == "teacher", "uses_oracle": self.uses_oracle}
        objects = [about | {"state": state} for state in STATES]
        for row in objects:
            if measured := self.evaluations.get(row["state"]):
                counts = {f"samples{split}": measured.samples[f"hack{split}"] for split in ("", "_known", "_held_out")}
                row |= measured.rates | counts | {"samples_all": measured.samples["format"]}
            row["steps"] = 0 if row["state"] == BASE else self.steps
            if row["state"] != BASE:
                row |= {"same_policy": self.same_policy, "last5_hack": self.last("hack"), "last5_solve": self.last("solve")}
        return objects


# ------------------------------------------------------------------------------------------------ reading


def read_runs(experiment: Path) -> list[Run]:
    """Every run, by name. Raises ReportError when there is none, or where a file is damaged."""
    return [read_run(folder) for folder in run_folders(experiment)]


def run_folders(experiment: Path) -> list[Path]:
    """The folders of the runs, by name. Raises ReportError when there is none."""
    folders = sorted(folder for folder in (experiment / "runs").glob("[!.]*") if folder.is_dir())
    if not folders:
        there = sorted(file.name for file in experiment.iterdir())[:6] if experiment.is_dir() else None
        found = "there is no such folder" if there is None else f"it holds {', '.join(there) or 'nothing'}"
        raise ReportError(f"expected an experiment with runs/<run>/ in {experiment}, but {found}. "
                          "Name a folder such as outputs/first, or make one with `make run`.")
    return folders


def read_run(folder: Path) -> Run:
    """What the files of a run say, of older code too (older.py). Raises ReportError where a file is damaged, and where the config does not
    say whether the run is a control."""
    frozen, evaluations = folder / "config.yaml", {}
    config = yaml.load(frozen.read_text(encoding="utf-8"), Loader) if frozen.exists() else None
    if config:
        config = completed(config)
        if config["mask_source"]["name"] != "none" and "control" not in config["mask_source"]:
            raise ReportError(f"expected mask_source.control in {frozen}; there is none. Code from before that word does not say whether a "
                              "run is a control: report it with the commit in its provenance.json, or run it again")
    said = read_json(folder / "status.json") or {"state": "new"}
    for state in STATES:
        if config and (stored := read_json(folder / "eval" / f"{state}.json")):
            evaluations[state] = Evaluation.of(stored["rates"], [row["loophole"] for row in stored["rows"]],
                                               config["loophole"]["known"], config["loophole"]["held_out"])
    metrics, audit = read_record(folder / "metrics.jsonl"), read_record(folder / "audit.jsonl")
    provenance = read_json(folder / "provenance.json")
    status, cause = said["state"], said.get("error") or said.get("cause")  # of a failed, of a collapsed run
    if status == "done":
        missing = [name for name, there in (("config.yaml", config), ("provenance.json", provenance)) if not there]
        missing += [f"eval/{state}.json" for state in STATES if state not in evaluations]
        missing += [f"{name} of all steps" for name, rows in (("metrics.jsonl", metrics), ("audit.jsonl", audit))
                    if config and len(rows) != config["trainer"]["steps"]]
        if missing:
            status, cause = "incomplete", f"status.json says done, but there is no {', '.join(missing)}"
    return Run(folder.name, config, status, cause, evaluations, metrics, audit, provenance)


def read_json(file: Path) -> dict | None:
    """None when the file is not there. Raises ReportError when it is not JSON."""
    return parse(file.read_text(encoding="utf-8"), str(file)) if file.exists() else None


def read_record(file: Path) -> list[dict]:
    """Rows of a JSONL file, up to its last line end: what follows is being written, or was when the run was killed."""
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.exists() else ""
    return [parse(line, f"line {number} of {file}") for number, line in enumerate(whole.splitlines(), 1)]


def parse(words: str, where: str) -> dict:
    try:
        return json.loads(words)
    except json.JSONDecodeError as error:
        raise ReportError(f"expected JSON in {where}, but {error}. Move that run folder away, or run it again.") from error
