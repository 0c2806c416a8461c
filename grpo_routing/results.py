"""What the files of an experiment say: its runs, their rates with intervals, and the arms that repeat over seeds.

Only finished runs enter an arm; every other run keeps its state and the cause. What was not measured is None, never 0.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import yaml

from grpo_routing.env.loopholes import NO_LOOPHOLE

BASE, TRAINED, DEPLOYED = STATES = ("base", "as_trained", "as_deployed")
RATES = ("hack", "hack_known", "hack_held_out", "attempted", "solve", "format", "lazy", "no_hint_solve", "no_hint_exploited")
GROUPS = ("adapter", "projection", "mask_source", "advantage", "prompt", "extra_rollouts")
FIELDS = ("arm", "seed", "loophole", "state", *RATES, "last5_hack", "last5_solve", "steps", "samples", "samples_known",
          "samples_held_out", "samples_all", "run", "status", "cause", "role", "imitation", "uses_oracle", "same_policy", *GROUPS,
          "pays", "train_family", "evaluation_family", "commit", "code")  # keys of a JSON object, in order
CONTROLS = ("random", "shuffled", "nonhack", "rate_matched")  # mask sources that know nothing of the hack
LAST = 5  # training steps behind last5_* and behind every point of a training curve
Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


class ReportError(ValueError):
    """The folder cannot be reported; the message says what was expected, what came and what to do."""


def flat_objects(runs: list[Run]) -> list[dict]:
    """FIELDS, then hack_<mode> of every mode that some run evaluated; null is what was not measured."""
    objects = [row for run in runs for row in run.objects()]
    modes = sorted({key for row in objects for key in row} - set(FIELDS))
    return [{key: row.get(key) for key in (*FIELDS, *modes)} for row in objects]


def wilson(rate: float, samples: int) -> tuple[float, float]:
    """95 % score interval of a rate over independent samples (Wilson 1927). Raises ReportError without samples."""
    if samples < 1:
        raise ReportError(f"an interval needs at least one sample; got {samples} for a rate of {rate}")
    centre, shrink = rate + Z95**2 / (2 * samples), 1 + Z95**2 / samples
    half = Z95 * math.sqrt(rate * (1 - rate) / samples + Z95**2 / (4 * samples**2))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


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
    status: str  # done, failed, running, stopped, new; or incomplete: said to be done, but files or steps are missing
    cause: str | None
    evaluations: dict[str, Evaluation]
    metrics: list[dict]
    audit: list[dict]
    provenance: dict | None

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
        if name["projection"] != "measure_only":
            return "control" if name["mask_source"] in CONTROLS else "method"
        if name["extra_rollouts"] == "teacher":
            return "imitation"
        plain = name["extra_rollouts"] == "none" and name["prompt"] == "plain" and name["advantage"] in ("dr_grpo", "grpo")
        return "vanilla" if plain and not self.uses_oracle else "method"

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
        found = [row[f"audit/{name}"] for row in self.audit]
        return [mean(found[max(0, step - LAST) : step]) for step in range(1, len(found) + 1)]

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
    """Every run folder, by name. Raises ReportError when there is none, or where a file is damaged."""
    folders = sorted(folder for folder in (experiment / "runs").glob("[!.]*") if folder.is_dir())
    if not folders:
        there = sorted(file.name for file in experiment.iterdir())[:6] if experiment.is_dir() else None
        found = "there is no such folder" if there is None else f"it holds {', '.join(there) or 'nothing'}"
        raise ReportError(f"expected an experiment with runs/<run>/ in {experiment}, but {found}. "
                          "Name a folder such as outputs/first, or make one with `make run`.")
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """What the files of a run say. Raises ReportError where a file is damaged."""
    frozen, evaluations = folder / "config.yaml", {}
    config = yaml.safe_load(frozen.read_text(encoding="utf-8")) if frozen.exists() else None
    said = read_json(folder / "status.json") or {"state": "new"}
    for state in STATES:
        if config and (stored := read_json(folder / "eval" / f"{state}.json")):
            evaluations[state] = Evaluation.of(stored["rates"], [row["loophole"] for row in stored["rows"]],
                                               config["loophole"]["known"], config["loophole"]["held_out"])
    metrics, audit = read_record(folder / "metrics.jsonl"), read_record(folder / "audit.jsonl")
    provenance = read_json(folder / "provenance.json")
    status, cause = said["state"], said.get("error")  # only a failed run has one
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


# ------------------------------------------------------------------------------------------------ arms


@dataclass(frozen=True)
class Arm:
    """The finished runs of one recipe, which differ in their seeds only: one row of the table, or two."""

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @property
    def block(self) -> str:
        """The heading that the arm stands under: an arm beside the vanilla of its adapter, a cheating one apart."""
        return "uses the oracle" if self.runs[0].uses_oracle else f"adapter {self.config['adapter']['name']}"

    @property
    def role(self) -> str:
        return self.runs[0].role

    @property
    def setting(self) -> tuple[str, ...]:
        """What must agree before two arms are compared: adapter, loopholes, and the names that evaluation discloses."""
        return (self.config["adapter"]["name"], *(self.config["loophole"][key] for key in ("name", "evaluation_family")))

    @property
    def same_policy(self) -> bool:
        return all(run.same_policy and run.evaluations[TRAINED].rates == run.evaluations[DEPLOYED].rates for run in self.runs)

    def values(self, state: str, rate: str) -> list[float]:
        """The measured rate of each seed."""
        return [run.rate(state, rate) for run in self.runs if run.rate(state, rate) is not None]

    def mean(self, state: str, rate: str) -> float | None:
        return mean(self.values(state, rate))

    def last(self, rate: str) -> float | None:
        return mean([run.last(rate) for run in self.runs])

    def curve(self, rate: str) -> list[float | None]:
        return [mean(seeds) for seeds in zip(*(run.curve(rate) for run in self.runs))]

    def span(self, state: str, rate: str) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the only seed, lowest and highest of several; None when not measured."""
        measured = [run for run in self.runs if run.rate(state, rate) is not None]
        if len(measured) == 1:
            return wilson(measured[0].rate(state, rate), measured[0].evaluations[state].samples[rate])
        return (min(self.values(state, rate)), max(self.values(state, rate))) if measured else None

    def gain(self, state: str) -> float | None:
        """Solve rate minus that of the same run before training, mean over seeds."""
        pairs = [(run.rate(state, "solve"), run.rate(BASE, "solve")) for run in self.runs]
        return mean([None if None in pair else pair[0] - pair[1] for pair in pairs])


def group(runs: list[Run]) -> list[Arm]:
    """Finished runs by recipe, in the order of the table. A label names what tells two recipes of one arm apart."""
    recipes, names, arms = defaultdict(list), defaultdict(list), []
    finished = sorted((run for run in runs if run.status == "done"), key=lambda run: run.config["seed"])
    several = len({run.config["loophole"]["name"] for run in finished}) > 1
    for run in finished:
        recipes[json.dumps(recipe(run.config), sort_keys=True)].append(run)
    for key, (run, *_) in recipes.items():
        names[run.config["arm_name"] + (f" {run.config['loophole']['name']}" if several else "")].append(key)
    for name, keys in names.items():
        flat = [json.loads(key) for key in keys]
        differing = sorted({k for one in flat for k in one if any(k not in other or other[k] != one[k] for other in flat)})
        for key, one in zip(keys, flat):
            arms.append(Arm(" ".join([name, *(f"{k}={one[k]}" for k in differing if k in one)]), tuple(recipes[key])))
    # A control follows its method because its name begins with the method's.
    order = {"vanilla": 0, "method": 1, "control": 1, "imitation": 2, "reference": 3}
    return sorted(arms, key=lambda arm: (arm.runs[0].uses_oracle, arm.block, order[arm.role], arm.label))


def recipe(config: dict) -> dict[str, object]:
    """The config, flat, without seeds and places: what the seeds of one arm share. The seeds of the model, the data
    and the evaluation stay, since another one is another experiment and no repetition."""
    flat = {}
    for key, node in config.items():
        if isinstance(node, dict):
            gone = {"cache"} if key in ("model", "dataset", "evaluation") else {"cache", "seed"}
            flat |= {f"{key}.{name}": value for name, value in node.items() if name not in gone and key != "logger"}
        elif key not in ("seed", "output", "cache", "experiment_name"):
            flat[key] = node
    return flat
