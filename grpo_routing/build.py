"""Names to objects. With run.py and __main__.py the only file that sees a config, and the one that refuses bad ones.

A group's YAML holds exactly the fields of one frozen dataclass (and `name`, where the group offers a choice), so a
typo, a missing value or a wrong type is found here, before any work, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from grpo_routing.adapters import ADAPTERS
from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.advantages import ADVANTAGES
from grpo_routing.env.grader import Grader
from grpo_routing.env.problems import LoopholeChoice, OpChains, Problem
from grpo_routing.extra_rollouts import EXTRA_ROLLOUTS
from grpo_routing.log import LOGGERS
from grpo_routing.mask_sources import MASK_SOURCES
from grpo_routing.models import MODELS
from grpo_routing.optimizers import OPTIMIZERS
from grpo_routing.policy import Policy
from grpo_routing.projections import PROJECTIONS
from grpo_routing.prompts import PROMPTS
from grpo_routing.settings import Evaluation, Reward, SandboxLimits
from grpo_routing.train import Audit, Line, Trainer


class ConfigError(ValueError):
    """The config cannot be run; the message lists every problem with its legal choices."""


# A group with a dict offers a choice by name; a group with a class has one shape whatever its file is called.
GROUPS: dict[str, type | dict[str, type]] = {
    "model": MODELS, "dataset": {"opchains": OpChains}, "loophole": LoopholeChoice, "reward": Reward, "sandbox": SandboxLimits,
    "projection": PROJECTIONS, "mask_source": MASK_SOURCES, "advantage": ADVANTAGES, "prompt": PROMPTS,
    "extra_rollouts": EXTRA_ROLLOUTS, "optimizer": OPTIMIZERS, "adapter": ADAPTERS, "trainer": Trainer,
    "evaluation": Evaluation, "logger": LOGGERS,
}
SCALARS = {"seed": int, "output": str, "cache": str, "arm_name": str, "experiment_name": str}


@dataclass(frozen=True)
class Plan:
    """One run, checked: an object per group."""

    model: Any
    dataset: OpChains
    loophole: LoopholeChoice
    reward: Reward
    sandbox: SandboxLimits
    projection: Any
    mask_source: Any
    advantage: Any
    prompt: Callable[[Problem], str]
    extra_rollouts: Any
    optimizer: Any
    adapter: Any
    trainer: Trainer
    evaluation: Evaluation
    logger: Any
    seed: int
    output: str
    cache: str
    arm_name: str
    experiment_name: str


def plan(config: dict) -> Plan:
    """Check a resolved config. Raises ConfigError with every problem found."""
    known = {*GROUPS, *SCALARS}
    problems = [f"unknown key {key!r}; the config has {', '.join(sorted(known))}" for key in config if key not in known]
    problems += [f"{key} is missing" for key in sorted(known - config.keys())]
    parts: dict[str, Any] = {}
    for group in GROUPS:
        if group in config:
            try:
                parts[group] = make(group, config[group])
            except ConfigError as error:
                problems.append(str(error))
    for key, kind in SCALARS.items():
        if key in config and type(config[key]) is not kind:
            problems.append(f"{key} must be {kind.__name__}; got {config[key]!r}")
    if not problems:
        problems = impossible(parts)
    if problems:
        raise ConfigError("\n".join(problems))
    return Plan(**parts, **{key: config[key] for key in SCALARS})


def make(group: str, node: Any) -> Any:
    """The object of one group. Raises ConfigError."""
    if not isinstance(node, dict):
        raise ConfigError(f"{group} must be a group of settings; got {node!r}")
    node, kind = dict(node), GROUPS[group]
    if isinstance(kind, dict):
        name = node.pop("name", None)
        if name not in kind:
            raise ConfigError(f"{group}.name={name!r} is unknown; choose from {', '.join(kind)}")
        kind = kind[name]
    if not isinstance(kind, type):
        return kind  # a plain function, such as a prompt
    return construct(group, kind, node)


def construct(where: str, kind: type, values: dict) -> Any:
    legal = [field.name for field in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in legal]
    missing = [key for key in legal if key not in values]
    if unknown or missing:
        faults = [f"{where}.{key} is not a setting" for key in unknown] + [f"{where}.{key} is missing" for key in missing]
        raise ConfigError(f"{'; '.join(faults)}. {where} has {', '.join(legal) or 'no settings'}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_say(where, one) for one in error.errors())) from error


def _say(where: str, error: dict) -> str:
    if error["type"] == "value_error":  # raised by the class itself, with its own words
        return str(error["ctx"]["error"])
    return f"{'.'.join([where, *map(str, error['loc'])])}: {error['msg'].lower()}; got {error['input']!r}"


def impossible(parts: dict[str, Any]) -> list[str]:
    """Combinations that cannot work, each with those that can."""
    problems = []
    projection, source, adapter = parts["projection"], parts["mask_source"], parts["adapter"]
    name = _name(PROJECTIONS, projection)
    if source.kind not in projection.takes:
        fitting = "|".join(one for one, kind in MASK_SOURCES.items() if kind.kind in projection.takes)
        problems.append(f"projection={name} needs a mask source of kind {' or '.join(projection.takes)}; "
                        f"{_name(MASK_SOURCES, source)} is of kind {source.kind}. "
                        f"Choose mask_source={fitting}, or projection=measure_only")
    if projection.needs_quarantine and QUARANTINE not in adapter.blocks:
        fitting = "|".join(one for one, kind in ADAPTERS.items() if QUARANTINE in kind.blocks)
        problems.append(f"projection={name} parks gradient in a quarantine block; adapter={_name(ADAPTERS, adapter)} has none. "
                        f"Choose adapter={fitting}")
    return problems


def _name(registry: dict[str, type], thing: Any) -> str:
    return next(name for name, kind in registry.items() if isinstance(thing, kind))


def build_policy(plan: Plan) -> Policy:
    model, tokenizer = plan.model.load()
    return Policy(model, tokenizer, plan.adapter.attach(model))


def build_line(plan: Plan, policy: Policy, grader: Grader, audit: Audit | None) -> Line:
    return Line(
        seed=plan.seed, policy=policy, problems=plan.dataset.training(plan.loophole), prompt=plan.prompt,
        extra_rollouts=plan.extra_rollouts, grader=grader, mask_source=plan.mask_source, advantage=plan.advantage,
        projection=plan.projection, optimizer=plan.optimizer, trainer=plan.trainer, audit=audit)
