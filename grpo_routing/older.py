"""Configs that older code froze: the settings that came since, at the value with which this code does what that code did.

Finished runs are read with them (deployment, recovery, obfuscation) and unfinished ones go on, so that a new setting does not close the
door on old results. A setting belongs here only while such a value exists; without one, planning refuses the config and says what is
missing. Every new one goes into UNNAMED: at that value it is no part of a run's name either, so that a sweep finds the runs that it has.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from grpo_routing.env.loopholes import OTHER, PLAIN
from grpo_routing.preparation import NONE

# Inert with stage none (preparation.py); they only have to be there.
UNPREPARED = {"stage": NONE, "samples": 1, "wrong_share": 0.5, "error_source": "off_policy", "mask_turn1": False, "tests": 1,
              "length_weights": [1.0], "epochs": 1, "batch": 1, "lr": 1.0e-4, "warmup_steps": 0, "temperature": 1.0, "max_new_tokens": 1,
              "seed": 0}
Setting = tuple[str, str, str, Any]  # group, its option ("" for every one), setting ("" for the whole group), value
UNNAMED: tuple[Setting, ...] = (
    ("sampling", "", "", {"name": "plain"}),
    ("rollout", "", "", {"name": "own"}),
    ("model", "", "prepare", UNPREPARED),
    ("advantage", "screening", "label", "loose"),
    ("advantage", "screening", "denominator", "batch"),
    ("mask_source", "persona_gradient", "per_loophole", False),
)
SINCE: tuple[Setting, ...] = (
    *UNNAMED,
    ("prompt", "", "", {"name": "plain"}),
    ("model", "organism", "other_form_share", 0.0),
    ("model", "organism", "report_share", 0.0),
    ("model", "organism", "instruction_share", 0.0),
    ("model", "organism", "instructed_hack_shares", {}),
    ("mask_source", "detector", "forms", [PLAIN, OTHER]),
    ("mask_source", "lookalike", "forms", [PLAIN, OTHER]),
    ("advantage", "penalty", "form", "progressive"),
    ("advantage", "penalty", "threshold", 0.5),
    ("advantage", "penalty", "scale", "none"),
)


def completed(config: dict) -> dict:
    """A copy of a frozen config with every setting of SINCE that it lacks. What it says stays as it is."""
    config = deepcopy(config)
    for group, option, setting, value in SINCE:
        if not setting:
            config.setdefault(group, deepcopy(value))
        elif group in config and option in ("", config[group].get("name")):
            config[group].setdefault(setting, deepcopy(value))
    return config


def unsaid(config: dict) -> dict:
    """The config without the settings of UNNAMED that change nothing: what a run is named by. A sweep asks a thousand times, so what stays
    is shared and not copied."""
    kept = dict(config)
    for group, option, setting, value in UNNAMED:
        if not setting:
            if group in kept and changes_nothing(kept[group], value):
                del kept[group]
        elif option in ("", kept.get(group, {}).get("name")) and changes_nothing(kept.get(group, {}).get(setting), value):
            kept[group] = {key: said for key, said in kept[group].items() if key != setting}
    return kept


def changes_nothing(said: Any, value: Any) -> bool:
    """Equality; of a group or a stage only its choice, the rest is inert with it."""
    if isinstance(value, dict) and isinstance(said, dict):
        choice = "stage" if "stage" in value else "name"
        return said.get(choice) == value[choice]
    return said == value
