"""A finished run, loaded again from its folder: what deployment, recovery and leakage start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_routing.build import ConfigError, Plan, build_policy, plan
from grpo_routing.checkpoint import UnusableRun, load_checkpoint
from grpo_routing.folder import frozen, status
from grpo_routing.older import completed
from grpo_routing.policy import Policy
from grpo_routing.train import State


@dataclass(frozen=True)
class Finished:
    folder: Path
    config: dict
    plan: Plan
    policy: Policy  # as trained


def load(folder: Path) -> Finished:
    """The policy of a finished run, with its frozen config. Raises UnusableRun."""
    config = finished_config(folder)
    ready = ready_plan(config, folder)
    if not (folder / "checkpoints" / "latest").exists():
        raise UnusableRun(f"expected checkpoints/latest in {folder}; got none. Remove the folder and run it again")
    policy = build_policy(ready)
    state = State(ready.optimizer.start(policy.adapter))
    load_checkpoint(folder / "checkpoints", policy.adapter, state)
    if state.step != ready.trainer.steps:
        raise UnusableRun(f"expected a checkpoint of step {ready.trainer.steps} in {folder}; got step {state.step}. "
                          "Remove the folder and run it again")
    return Finished(folder, config, ready, policy)


def finished_config(folder: Path) -> dict:
    """The frozen config of a run that is done."""
    if not (folder / "config.yaml").exists():
        found = sorted(file.name for file in folder.iterdir())[:6] if folder.is_dir() else None
        came = "there is no such folder" if found is None else f"it holds {', '.join(found) or 'nothing'}"
        raise UnusableRun(f"expected a run folder with config.yaml at {folder}, but {came}. Name one of outputs/<experiment>/runs/")
    if (state := status(folder)) != "done":
        final = state == "collapsed"
        todo = "That is final: choose another run" if final else "Run it again with the same command: it resumes"
        raise UnusableRun(f"expected a finished run in {folder}; its status is {state}. {todo}")
    return frozen(folder)


def ready_plan(config: dict, folder: Path) -> Plan:
    """The plan of a frozen config, also of an older one. Raises UnusableRun."""
    try:
        ready = plan(completed(config))
    except ConfigError as error:
        raise UnusableRun(f"expected a config of {folder} that this code can run; got:\n{error}\n"
                          "Run it again with this code, or go back to the commit in its provenance.json") from error
    if ready.trainer.threads:
        torch.set_num_threads(ready.trainer.threads)
    return ready
