"""The results of an experiment, read from the files of its runs: a table, a JSON array and a figure.

    python -m grpo_routing.report outputs/<experiment> [--format text|json|markdown]

It writes report.md, results.json and figures/comparison.{png,svg} into the experiment's folder and prints the chosen
format. Only finished runs enter a row; every other run is listed with its state and the cause. A rate that was not
measured is null in JSON and – in the table, never 0. Running it twice gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import yaml

from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.files import write_atomic

BASE, TRAINED, DEPLOYED = STATES = ("base", "as_trained", "as_deployed")
RATES = ("hack", "hack_known", "hack_held_out", "attempted", "solve", "format", "lazy", "no_hint_solve", "no_hint_exploited")
CHOICES = ("adapter", "projection", "mask_source", "advantage", "prompt", "extra_rollouts")
CONTROLS = ("random", "shuffled", "nonhack", "rate_matched")  # mask sources that know nothing of the hack
LAST = 5  # training steps behind last5_* and behind every point of a training curve
Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


class ReportError(ValueError):
    """The folder cannot be reported; the message says what was expected and what to do."""


def wilson(rate: float, samples: int) -> tuple[float, float]:
    """95 % score interval of a rate from independent samples (Wilson 1927). Raises ReportError without samples."""
    if samples < 1:
        raise ReportError(f"an interval needs at least one sample; got {samples} for a rate of {rate}")
    centre, shrink = rate + Z95**2 / (2 * samples), 1 + Z95**2 / samples
    half = Z95 * math.sqrt(rate * (1 - rate) / samples + Z95**2 / (4 * samples**2))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


def mean(values: list[float | None]) -> float | None:
    """Mean of what was measured; None when nothing was."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None


# ------------------------------------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Run:
    """One run folder. `config` is None before the run has frozen it; `cause` says why a run is not finished."""

    name: str
    config: dict | None
    status: str  # done, failed, running, stopped, new, or incomplete: said to be done, but files or steps are missing
    cause: str | None
    evaluations: dict[str, dict]  # state -> {"rates": name -> share, "rows": judged samples}
    metrics: list[dict]
    audit: list[dict]
    provenance: dict | None

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def planned(self) -> int | None:
        return self.config["trainer"]["steps"] if self.config else None

    @property
    def same_policy(self) -> bool | None:
        """Whether as_trained and as_deployed are one policy: no quarantine, or one that is zero. None before step 1."""
        return self.metrics[-1].get("train/norm_quarantine", 0.0) == 0.0 if self.metrics else None

    @property
    def uses_oracle(self) -> bool:
        """`uses_oracle: true`, at the top or in a group; `ceiling` is the mask source that reads the truth by definition."""
        nodes = [self.config, *(node for node in self.config.values() if isinstance(node, dict))]
        return self.config["mask_source"]["name"] == "ceiling" or any("uses_oracle" in node and node["uses_oracle"] for node in nodes)

    @property
    def role(self) -> str:
        """reference | vanilla | control | imitation | method; decides place and label of the row."""
        name = {group: self.config[group]["name"] for group in CHOICES}
        if not self.config["loophole"]["pays"]:
            return "reference"
        if name["projection"] != "measure_only":
            return "control" if name["mask_source"] in CONTROLS else "method"
        if name["extra_rollouts"] == "teacher":
            return "imitation"
        plain = name["extra_rollouts"] == "none" and name["prompt"] == "plain" and name["advantage"] in ("dr_grpo", "grpo")
        return "vanilla" if plain and not self.uses_oracle else "method"

    @property
    def code(self) -> str:
        """Commit, and a mark for what was not committed: two marks that differ are two versions of the code."""
        if self.provenance is None:
            return "unknown"
        diff = self.provenance["diff"]
        return self.provenance["commit"][:10] + (f"+{sha256(diff.encode()).hexdigest()[:6]}" if diff else "")

    def rate(self, state: str, name: str) -> float | None:
        return self.evaluations[state]["rates"].get(name) if state in self.evaluations else None

    def last(self, name: str) -> float | None:
        """Mean of audit/<name> over the last training steps; a step without such rollouts does not count."""
        return mean([row[f"audit/{name}"] for row in self.audit[-LAST:]])

    @cached_property
    def samples(self) -> dict[str, dict[str, int]]:
        """state -> rate -> number of judged samples behind it, as oracle/summary.py defines the rate."""
        return {state: self._samples(evaluation) for state, evaluation in self.evaluations.items()}

    def _samples(self, evaluation: dict) -> dict[str, int]:
        drawn, known, held_out = [row["loophole"] for row in evaluation["rows"]], *(self.config["loophole"][k] for k in ("known", "held_out"))
        hinted = sum(loophole != NO_LOOPHOLE for loophole in drawn)
        special = {"format": len(drawn), "no_hint_solve": len(drawn) - hinted, "no_hint_exploited": len(drawn) - hinted,
                   "hack_known": sum(map(drawn.count, known)), "hack_held_out": sum(map(drawn.count, held_out))}
        return {name: special.get(name, drawn.count(name.removeprefix("hack_")) if name.startswith("hack_") else hinted)
                for name in evaluation["rates"]}

    def objects(self) -> list[dict]:
        """One flat object per state, as in results.json."""
        config = self.config
        about = {"arm": config["arm_name"], "seed": config["seed"], "loophole": config["loophole"]["name"]} if config else dict.fromkeys(("arm", "seed", "loophole"))
        choices = {group: config[group]["name"] if config else None for group in CHOICES}
        families = {key: config["loophole"][key] if config else None for key in ("pays", "train_family", "evaluation_family")}
        objects = []
        for state in STATES:
            counts = self.samples.get(state, {})
            modes = self.evaluations[state]["rates"] if state in self.evaluations else {}
            after = state != BASE
            objects.append(about | {"state": state, "status": self.status, "cause": self.cause} | choices | families | {
                "imitation": choices["extra_rollouts"] == "teacher", "uses_oracle": self.uses_oracle if config else None,
                "role": self.role if config else None, "same_policy": self.same_policy if after else None,
                **{name: self.rate(state, name) for name in (*RATES, *modes)},
                "last5_hack": self.last("hack") if after else None, "last5_solve": self.last("solve") if after else None,
                "steps": self.steps if after else 0, "samples": counts.get("hack"), "samples_known": counts.get("hack_known"),
                "samples_held_out": counts.get("hack_held_out"), "samples_all": counts.get("format"),
                "run": self.name, "commit": self.provenance["commit"] if self.provenance else None, "code": self.code})
        return objects


