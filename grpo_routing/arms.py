"""Runs that differ in their seeds only are one arm: a row of the table. Which runs those are, their means, and their names."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass

from grpo_routing.older import unsaid
from grpo_routing.results import BASE, DEPLOYED, RESTRICTED, TRAINED, ReportError, Run, mean

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile
# keys that need no group in a label
SHORT = {f"mask_source.{key}": key for key in ("recall", "false_positive", "noise", "control", "pairs", "forms", "position")}
UNSAID = ("mask_source.control", "none")  # a label without the word says so
SPREAD = ("mask_source.recall",)  # named in every label once two arms of the experiment differ in it


def wilson(rate: float, samples: int) -> tuple[float, float]:
    """95 % score interval of a rate over independent samples (Wilson 1927). Raises ReportError without samples."""
    if samples < 1:
        raise ReportError(f"an interval needs at least one sample; got {samples} for a rate of {rate}")
    centre, shrink = rate + Z95**2 / (2 * samples), 1 + Z95**2 / samples
    half = Z95 * math.sqrt(rate * (1 - rate) / samples + Z95**2 / (4 * samples**2))
    return max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)


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

    @property
    def collapsed(self) -> int:
        return sum(run.collapsed for run in self.runs)

    def curve(self, rate: str) -> list[float | None]:
        return average([run.curve(rate) for run in self.runs])

    def series(self, metric: str) -> list[float | None]:
        return average([run.series(metric) for run in self.runs])

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


def average(curves: list[list[float | None]]) -> list[float | None]:
    """Mean over seeds per step."""
    return [mean(values) for values in carried(curves)]


def carried(curves: list[list[float | None]]) -> list[list[float | None]]:
    """The seeds' values per step. The curve of a seed that collapsed goes on at its last value: it would not have been trained
    any further, and a mean of the survivors alone would look healthy."""
    longest = max(map(len, curves))
    whole = [curve + curve[-1:] * (longest - len(curve)) for curve in curves]
    return [[curve[step] for curve in whole if curve] for step in range(longest)]


def group(runs: list[Run]) -> list[Arm]:
    """Finished runs by recipe, in the order of the table. A label names what tells two recipes of one arm apart."""
    recipes, names, arms = defaultdict(list), defaultdict(list), []
    finished = sorted((run for run in runs if run.finished), key=lambda run: run.config["seed"])
    several = len({run.config["loophole"]["name"] for run in finished}) > 1
    for run in finished:
        recipes[json.dumps(recipe(run.config), sort_keys=True)].append(run)
    for key, (run, *_) in recipes.items():
        names[run.config["arm_name"] + (f" {run.config['loophole']['name']}" if several else "")].append(key)
    everything = [json.loads(key) for key in recipes]
    spread = {k for k in SPREAD if len({json.dumps(one[k]) for one in everything if k in one}) > 1}
    for name, keys in names.items():
        flat = [json.loads(key) for key in keys]
        differing = {k for one in flat for k in one if any(k not in other or other[k] != one[k] for other in flat)}
        for key, one in zip(keys, flat):
            told = [f"{SHORT.get(k, k)}={one[k]}" for k in sorted(differing | spread) if k in one and (k, one[k]) != UNSAID]
            arms.append(Arm(" ".join([name, *told]), tuple(recipes[key])))
    return sorted(arms, key=place)


def place(arm: Arm) -> tuple:
    """Where an arm stands in the table. A control of a method's mask source or projection follows the method, because its name
    begins with the method's; other controls come after all methods. Numbers in a label are sorted as numbers."""
    run, (name, *rest) = arm.runs[0], arm.label.split(" ")
    beside = run.control in (run.mask_control, *RESTRICTED.values())
    order = {"vanilla": 0, "method": 1, "control": 1 if beside else 2, "imitation": 3, "reference": 4}
    parts = re.split(r"(\d+(?:\.\d+)?)", " ".join(rest))  # words and numbers by turns
    return run.uses_oracle, arm.block, order[arm.role], name, [float(part) if at % 2 else part for at, part in enumerate(parts)]


def recipe(config: dict) -> dict[str, object]:
    """The config, flat, without seeds and places: what the seeds of one arm share. The seeds of the model, the data
    and the evaluation stay, since another one is another experiment and no repetition."""
    found = {key: node for key, node in unsaid(config).items() if key not in ("seed", "output", "cache", "experiment_name", "logger")}
    return {place: value for key, node in found.items() for place, value in flattened(key, node).items()}


def flattened(place: str, node: object) -> dict[str, object]:
    """Dotted name -> value, also of a group within a group, such as a source of a composed mask source."""
    if not isinstance(node, dict):
        return {place: node}
    gone = {"cache"} if place in ("model", "dataset", "evaluation") else {"cache", "seed"}
    return {inner: value for name, own in node.items() if name not in gone for inner, value in flattened(f"{place}.{name}", own).items()}
