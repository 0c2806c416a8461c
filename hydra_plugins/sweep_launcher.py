"""`hydra/launcher=slurm|local`: the whole sweep is planned and frozen, then handed over; `python -m launchers` does the rest.

The sweeper gives every run, resolved and checked, before it launches anything (`plan`); what is wrong with the sweep as a whole goes
into its list of errors. `launch` writes plan.json and the frozen configs and submits. A class that Hydra takes for a launcher has to be
defined here; what it does is in launchers/, which knows no torch.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from grpo_routing.build import plan as checked
from grpo_routing.folder import code_state, freeze, run_folder
from hydra_plugins.sweep_configs import Composed, compose_all
from launchers import actions, table
from launchers.plan import Entry, SweepPlan, extend, gaps, read_plan
from launchers.settings import LaunchError, resources_of, settings_of

if TYPE_CHECKING:
    from grpo_routing.build import Plan

log = logging.getLogger("launchers")
CODE = Path(__file__).resolve().parent.parent


class SweepLauncher(Launcher):
    def __init__(self, **settings: object) -> None:
        plain = {key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                 for key, value in settings.items()}
        try:
            self.settings = settings_of(plain)
        except LaunchError as error:
            raise CompactHydraException(str(error)) from error
        self.planned: SweepPlan | None = None
        self.runs: list[tuple[Entry, dict]] = []

    def setup(self, *, hydra_context: object, task_function: object, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def plan(self, runs: list[tuple[Composed, Plan]]) -> list[str]:
        """Take the runs of the sweep; returns what is wrong with them together."""
        folders = [run_folder(one.config, ready) for one, ready in runs]
        roots = sorted({str(folder.parent.parent) for folder in folders})
        if len(roots) > 1:
            return [f"a sweep goes into one folder; these go to {', '.join(roots)}. Sweep them one after another"]
        for folder, (one, ready) in zip(folders, runs):
            resources = resources_of(self.settings, one.choices["model"], ready.arm_name)
            self.runs.append((Entry(folder.name, ready.arm_name, ready.loophole.name, ready.seed,
                                    ready.trainer.steps, resources.__dict__), one.config))
        entries = [entry for entry, _ in self.runs]
        if not roots:
            return []
        state = code_state()
        history = [{"time": time.time(), "commit": state["commit"], "runs": len(entries), "diff": short(state["diff"])}]
        code = {"folder": str(CODE), "python": sys.executable, "cwd": os.getcwd()}
        self.planned = SweepPlan(Path(roots[0]), code, history, self.settings, entries)
        return self._faults(entries)

    def _faults(self, entries: list[Entry]) -> list[str]:
        """Runs that are there twice, and seeds that are not there: in this sweep, and with what its folder already has."""
        twice = [f"duplicate: {name} is planned {count} times; two words of the sweep mean the same run"
                 for name, count in Counter(one.folder for one in entries).items() if count > 1]
        try:
            old = read_plan(self.planned.root).entries if (self.planned.root / "plan.json").exists() else []
        except LaunchError as error:
            return [*twice, str(error)]
        whole = {one.folder: one for one in [*old, *entries]}
        return twice + (gaps(list(whole.values())) if self.settings.gaps == "refuse" else [])

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Freeze, submit, and wait if asked to. Raises HydraException before anything is started, or when a run has no result."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.planned is None:  # another sweeper than ours: nobody has planned
            composed, problems = compose_all(self.hydra_context.config_loader, self.config, [list(job) for job in job_overrides])
            problems = problems or self.plan([(one, checked(one.config)) for one in composed])
            if problems:
                raise CompactHydraException("the sweep was refused before its first run:\n" + "\n".join(problems))
        try:
            return self._launch(len(job_overrides))
        except LaunchError as error:
            raise CompactHydraException(str(error)) from error

    def _launch(self, count: int) -> list[JobReturn]:
        mine = [entry.folder for entry, _ in self.runs]
        for entry, config in self.runs:
            freeze_run(self.planned.root / "runs" / entry.folder, config)
        plan, new = extend(self.planned)
        entries = [one for one in plan.entries if one.folder in set(mine)]
        say(f"planned {len(entries)} runs in {plan.root} ({new} new): {actions.summary(plan, entries, {})}")
        how = f"python -m launchers watch {plan.root}"
        if not self.settings.submit:
            say(f"nothing was started; python -m launchers submit {plan.root} starts them")
        else:
            actions.submit(plan, mine, {}, say)
            if not self.settings.wait:
                say(f"they go on without this process; {how}")
        if not (self.settings.submit and self.settings.wait):
            return [JobReturn(_return_value=None, status=JobStatus.COMPLETED)] * count
        say(f"waiting; to leave, interrupt: nothing ends with this process, and {how} comes back")
        found = table.watch(plan, False, say)
        line, good = actions.verdict(plan, [one for one in found if one.entry.folder in set(mine)])
        table.show(plan, found, "")
        if not good:
            raise LaunchError(line)
        return [JobReturn(_return_value="done", status=JobStatus.COMPLETED)] * count


def freeze_run(folder: Path, config: dict) -> None:
    """The run's folder with its config, unless it is there. Raises LaunchError where that folder holds another one."""
    try:
        freeze(folder, config)
    except FileExistsError as error:
        raise LaunchError(str(error)) from error


def short(diff: str) -> str | None:
    """A mark of what was not committed; the whole of it is in every attempt's record."""
    return sha256(diff.encode()).hexdigest()[:12] if diff else None


def say(line: str) -> None:
    print(line, flush=True)
