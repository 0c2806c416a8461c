"""What every arm changes and declares, as the two tables of docs/methods.md, from conf/ and from the planned objects themselves.

    stages      the groups in which an arm differs from the line with every default
    declared    its stages, the signal that training reads beyond the reward, what that signal knows about loopholes, and what changes
                at deployment: read off the objects (`reads`, `known`, `uses_oracle`, blocks, `at_deployment`), so no arm can say otherwise

`python -m grpo_routing.walkthrough --write` renews both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from grpo_routing import build

ROOT = Path(__file__).resolve().parent.parent
ACTING = ("prompt", "sampling", "extra_rollouts", "mask_source", "advantage", "projection", "optimizer")  # in the order of the line
NEUTRAL = {"advantage": "dr_grpo", "projection": "measure_only", "optimizer": "adamw", "prompt": "plain", "sampling": "plain",
           "extra_rollouts": "none", "mask_source": "none"}


def composed(*overrides: str, choices: bool = False) -> DictConfig:
    """The config of these words; with `choices`, also which option of each group was taken, under `hydra`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*overrides], return_hydra_config=choices)


@cache
def arm_config(arm: str) -> DictConfig:
    """An arm's config with the options that were taken; both tables read it, and composing takes longer than planning."""
    return composed(f"arm={arm}", *needed(arm), choices=True)


def arms() -> list[str]:
    """Every arm but the one that changes nothing."""
    return sorted(file.stem for file in (ROOT / "conf" / "arm").glob("*.yaml") if file.stem != "custom")


@cache
def stages_table() -> str:
    """Arm by arm, what differs from the line with every default; from conf/."""
    default = composed("arm=custom", choices=True)
    configs = {arm: arm_config(arm) for arm in arms()}
    cells = {arm: {group: change(group, config, default) for group in build.GROUPS} for arm, config in configs.items()}
    columns = [group for group in build.GROUPS if any(row[group] for row in cells.values())]
    lines = [["arm", *columns], ["---"] * (len(columns) + 1), ["(default)", *(f"*{choice(default, g)}*" for g in columns)]]
    lines += [[f"`{arm}`", *(row[group] for group in columns)] for arm, row in cells.items()]
    return table(lines)


def choice(config: DictConfig, group: str) -> str:
    return config.hydra.runtime.choices[group]


def change(group: str, config: DictConfig, default: DictConfig) -> str:
    """The group's option if it is another one, with its control if it has one; else the values that differ; empty when nothing does."""
    if choice(config, group) != choice(default, group):
        control = config[group].control if "control" in config[group] else "none"
        return f"`{choice(config, group)}`" + (f" `control={control}`" if control != "none" else "")
    return ", ".join(f"`{key}={value}`" for key, value in config[group].items() if value != default[group][key])


@cache
def declared_table() -> str:
    """Arm by arm, what the planned run declares."""
    rows = []
    for arm in arms():
        whole = arm_config(arm)
        own = OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])
        config = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
        rows.append([f"`{arm}`", *declared(build.plan(config), config)])
    return table([["arm", "acts at", "signal", "knows about loopholes", "at deployment"], ["---"] * 5, *rows])


def needed(arm: str) -> list[str]:
    """What an arm cannot be planned without: a teacher's pool is a file that a user builds."""
    return [f"extra_rollouts.pool={ROOT / 'README.md'}"] if arm == "teacher" else []


def declared(ready: build.Plan, config: dict) -> list[str]:
    """Stages, signal, knowledge and change at deployment of one run."""
    names = {group: config[group]["name"] for group in ACTING}
    acting = [group for group in ACTING if names[group] != NEUTRAL[group] and (group != "mask_source" or ready.source_acts)]
    signal = [word for group in acting for word in getattr(getattr(ready, group), "reads", ())]
    signal = [word for word in dict.fromkeys(signal) if word not in ("flags", "scores")]  # those are the mask source's own
    told = {mode for group in acting for mode in known(getattr(ready, group))}
    knows = "**all, from the oracle (stamped)**" if ready.uses_oracle else "the known ones" if told else "nothing"
    changes = ["quarantine deleted"] if ready.projection.needs_quarantine else []  # an svd has one that nothing may train
    changes += [word for group in acting for word in getattr(getattr(ready, group), "at_deployment", ())]
    return [", ".join(acting) or "–", ", ".join(signal) or "–", knows, ", ".join(changes) or "nothing"]


def known(thing: Any) -> list[str]:
    """Loopholes that an object, or a part of it, was told about by name."""
    parts = [part for name in ("first", "second", "inner", "judge") if (part := getattr(thing, name, None)) is not None]
    return [*getattr(thing, "known", ()), *(mode for part in parts for mode in known(part))]


def table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"stages": stages_table, "declared": declared_table}


def between(name: str) -> tuple[str, str]:
    """The marks around a table."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def with_tables(text: str) -> str:
    """The text with fresh tables between their marks."""
    for name, made in TABLES.items():
        begin, end = between(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{made()}\n\n{end}{rest.split(end)[1]}"
    return text
