"""`-m`: Hydra's product of choices, planned before the first run and with a negative control beside every treatment.

Every run is composed and checked first, so a config that cannot be run ends a sweep before it has begun, with all problems at once.
A run whose mask source acts on training, or whose sampling is not plain, and that is no control is a treatment; `controls` says what
a sweep does that lacks the control of one (`mask_source.control` or `sampling.control`, its `default_control`):

    add      runs it too: the same overrides and that word (default)
    refuse   ends with the list of what is missing
    none     runs what was asked for

`hypotheses` are frozen with the plan, before the first run (grpo_routing/preregistration.py). What so many seeds can find at the `spread`
that is expected of a paired difference is said with it (grpo_routing/foresight.py).

A launcher that has a `plan` (sweep_launcher.py) gets the planned runs and adds its own objections to the one list of errors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import CompactHydraException, HydraException
from omegaconf import OmegaConf

from grpo_routing.build import ConfigError, Plan, plan
from grpo_routing.preregistration import parse, register
from grpo_routing.results import ReportError
from hydra_plugins.sweep_configs import Composed, compose_all

log = logging.getLogger("grpo_routing")
CHOICES = ("add", "refuse", "none")
NAMES = ("arm_name", "experiment_name", "output", "cache", "logger")  # what two runs of one recipe may differ in


class ControlledSweeper(BasicSweeper):
    def __init__(self, max_batch_size: int | None, controls: str, hypotheses: list, spread: dict, params: dict | None = None) -> None:
        super().__init__(max_batch_size, params)
        if controls not in CHOICES:
            raise HydraException(f"hydra.sweeper.controls must be one of {', '.join(CHOICES)}; got {controls!r}")
        self.controls = controls
        self.hypotheses = OmegaConf.to_container(OmegaConf.create(list(hypotheses)), resolve=True)
        self.spread = dict(spread)

    def split_arguments(self, overrides: list, max_batch_size: int | None) -> list[list[list[str]]]:
        """The jobs of the sweep, its controls included. Raises HydraException with everything that is wrong or missing."""
        jobs = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
        planned, problems = self._planned(jobs)
        there, missing = {recipe(one.config) for one, _ in planned}, {}
        for one, ready in planned:
            for group, wanted in controls_of(ready).items():
                control = one.config | {group: one.config[group] | {"control": wanted}}
                if recipe(control) not in there:
                    missing[recipe(control)] = [*one.words, f"{group}.control={wanted}"]
        if missing and self.controls == "add":
            log.info("adding %d controls to %d runs (hydra.sweeper.controls=none leaves them out)", len(missing), len(jobs))
            jobs += missing.values()
            added, faults = self._planned(list(missing.values()))
            planned, problems = planned + added, problems + faults
        elif missing and self.controls == "refuse":
            said = "\n".join(" ".join(job) for job in missing.values())
            problems.append(f"the sweep lacks {len(missing)} controls; add them, or set hydra.sweeper.controls=add or none:\n{said}")
        if hasattr(self.launcher, "plan"):
            problems += self.launcher.plan(planned)
        if not problems:
            problems += self._say([one.config for one, _ in planned])
        if problems:
            raise CompactHydraException("the sweep was refused before its first run:\n" + "\n".join(problems))
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def _say(self, configs: list[dict]) -> list[str]:
        """Say what the sweep can find and freeze what it claims, unless that is malformed or about what is not in it; what is wrong."""
        from grpo_routing.foresight import foreseen  # scipy takes longer to load than a small run's first step

        try:
            said = foreseen(configs, parse(self.hypotheses), self.spread)
            said += register(self.hypotheses, configs, self.config.hydra.runtime.choices["experiment"]) if self.hypotheses else []
        except ReportError as error:
            return [str(error)]
        for line in said:
            log.warning(line) if line.startswith("!!!") else log.info(line)
        return []

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: the whole sweep was planned already."""

    def _planned(self, jobs: list[list[str]]) -> tuple[list[tuple[Composed, Plan]], list[str]]:
        """Every job that can be run, and what is wrong with the others."""
        composed, problems = compose_all(self.hydra_context.config_loader, self.config, jobs)
        found = []
        for one in composed:
            try:
                found.append((one, plan(one.config)))
            except ConfigError as error:
                problems.append(f"{' '.join(one.words)}: {error}")
        return found, problems


def controls_of(ready: Plan) -> dict[str, str]:
    """Group -> the control that a run needs beside it; nothing for one that is no treatment, or a control, or stamped as cheating."""
    acting = {"mask_source": ready.source_acts, "sampling": ready.sampling.default_control != "none"}
    if ready.uses_oracle or any(getattr(ready, group).control != "none" for group in acting):
        return {}
    return {group: getattr(ready, group).default_control for group, acts in acting.items() if acts}


def recipe(config: dict) -> str:
    """Everything that decides what a run computes, as text."""
    return json.dumps({key: value for key, value in config.items() if key not in NAMES}, sort_keys=True)
