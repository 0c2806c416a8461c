"""Names to objects. With run.py and __main__.py the only file that sees a config, and the one that refuses bad ones or warns about them.

A group's YAML holds exactly the fields of one frozen dataclass (and `name`, where the group offers a choice), so a
typo, a missing value or a wrong type is found here, before any work, and all problems are reported at once.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from grpo_routing.adapters import ADAPTERS
from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.adapters.mlp import Mlp
from grpo_routing.advantages import ADVANTAGES, Penalty
from grpo_routing.engines import ENGINES
from grpo_routing.env.grader import Grader
from grpo_routing.env.problems import LoopholeChoice, OpChains, Problem
from grpo_routing.extra_rollouts import EXTRA_ROLLOUTS
from grpo_routing.health import Tripwire
from grpo_routing.leetcode import Filtered, LeetCode
from grpo_routing.log import LOGGERS
from grpo_routing.mask_sources import MASK_SOURCES
from grpo_routing.models import MODELS
from grpo_routing.optimizers import OPTIMIZERS
from grpo_routing.parallel import ALONE, World
from grpo_routing.policy import Policy
from grpo_routing.projections import PROJECTIONS, MeasureOnly
from grpo_routing.projections.route import W_MAX
from grpo_routing.prompts import PROMPTS
from grpo_routing.sampling import SAMPLINGS, Plain
from grpo_routing.self_report_sft import prepared
from grpo_routing.settings import Evaluation, Reward, SandboxLimits
from grpo_routing.train import Audit, Line, Trainer, Truth

log = logging.getLogger("grpo_routing")


class ConfigError(ValueError):
    """The config cannot be run; the message lists every problem with its legal choices."""


DATASETS = {"opchains": OpChains, "leetcode": LeetCode}
# A group with a dict offers a choice by name; a group with a class has one shape whatever its file is called.
GROUPS: dict[str, type | dict[str, type]] = {
    "model": MODELS, "dataset": DATASETS, "loophole": LoopholeChoice, "reward": Reward, "sandbox": SandboxLimits,
    "projection": PROJECTIONS, "mask_source": MASK_SOURCES, "advantage": ADVANTAGES, "prompt": PROMPTS, "sampling": SAMPLINGS,
    "rollout": ENGINES,
    "extra_rollouts": EXTRA_ROLLOUTS, "optimizer": OPTIMIZERS, "adapter": ADAPTERS, "trainer": Trainer,
    "health": Tripwire, "evaluation": Evaluation, "logger": LOGGERS,
}
SCALARS = {"seed": int, "uses_oracle": bool, "output": str, "cache": str, "arm_name": str, "experiment_name": str}
UNSEALED = "confession_routed"  # how an arm is called in which something else reads confessions


@dataclass(frozen=True)
class Plan:
    """One run, checked: an object per group."""

    model: Any
    dataset: OpChains | Filtered
    loophole: LoopholeChoice
    reward: Reward
    sandbox: SandboxLimits
    projection: Any
    mask_source: Any
    advantage: Any
    prompt: Any
    sampling: Any
    rollout: Any
    extra_rollouts: Any
    optimizer: Any
    adapter: Any
    trainer: Trainer
    health: Tripwire
    evaluation: Evaluation
    logger: Any
    seed: int
    uses_oracle: bool
    output: str
    cache: str
    arm_name: str
    experiment_name: str

    @property
    def source_acts(self) -> bool:
        """Whether what the mask source says reaches training, and is not only measured."""
        reads = {"flags", "scores"} & set(self.advantage.reads)
        acts = not isinstance(self.projection, MeasureOnly) or bool(reads or self.extra_rollouts.groups)
        return self.mask_source.kind != "none" and acts


def plan(config: dict) -> Plan:
    """Check a resolved config; warn about one that can run and probably not do what it is for. Raises ConfigError with every problem
    found."""
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
        problems = impossible(parts, config["uses_oracle"], config["arm_name"])
    if problems:
        raise ConfigError("\n".join(problems))
    for doubt in doubtful(parts):
        warn(doubt)
    parts["dataset"] = parts["dataset"].on(parts["model"], parts["sandbox"])
    return Plan(**parts, **{key: config[key] for key in SCALARS})


def make(group: str, node: Any) -> Any:
    """The object of one group. Raises ConfigError."""
    if not isinstance(node, dict):
        raise ConfigError(f"{group} must be a group of settings; got {node!r}")
    node, kind = {key: nested(group, value) for key, value in node.items()}, GROUPS[group]
    if isinstance(kind, dict):
        name = node.pop("name", None)
        if name not in kind:
            raise ConfigError(f"{group}.name={name!r} is unknown; choose from {', '.join(kind)}")
        kind = kind[name]
    return construct(group, kind, node)


def nested(group: str, value: Any) -> Any:
    """A group of a group (`mask_source.first` of an `or`) is made first."""
    return make(group, value) if isinstance(value, dict) and isinstance(GROUPS[group], dict) and "name" in value else value


_adapter, _hints = cache(TypeAdapter), cache(get_type_hints)  # a sweep checks every class a thousand times


def construct(where: str, kind: type, values: dict) -> Any:
    legal = [field.name for field in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in legal]
    missing = [key for key in legal if key not in values]
    for name, kind_of in _hints(kind).items():  # a dataclass within (mask_source.calibration) is checked like a group
        if dataclasses.is_dataclass(kind_of) and isinstance(values.get(name), dict):
            values = values | {name: construct(f"{where}.{name}", kind_of, values[name])}
    if unknown or missing:
        faults = [f"{where}.{key} is not a setting" for key in unknown] + [f"{where}.{key} is missing" for key in missing]
        raise ConfigError(f"{'; '.join(faults)}. {where} has {', '.join(legal) or 'no settings'}")
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_say(where, one) for one in error.errors())) from error


def _say(where: str, error: dict) -> str:
    if error["type"] == "value_error":  # raised by the class itself, with its own words
        return str(error["ctx"]["error"])
    return f"{'.'.join([where, *map(str, error['loc'])])}: {error['msg'].lower()}; got {error['input']!r}"


def impossible(parts: dict[str, Any], uses_oracle: bool, arm_name: str) -> list[str]:
    """Combinations that cannot work, each with those that can."""
    projection, source, adapter = parts["projection"], parts["mask_source"], parts["adapter"]
    advantage, optimizer, extra, trainer = parts["advantage"], parts["optimizer"], parts["extra_rollouts"], parts["trainer"]
    name, origin = _name(PROJECTIONS, projection), _name(MASK_SOURCES, source)
    quarantine = QUARANTINE in adapter.blocks
    weight = projection.heaviest(adapter.sizes) if quarantine else 1.0
    sealed = getattr(extra, "sealed", None)  # of confessions; None: nobody confesses
    holds = {
        f"projection={name} takes a mask source of kind {' or '.join(projection.takes)}; {origin} is of kind {source.kind}. "
        f"Choose {fitting(projection, source)}": source.kind not in projection.takes,
        f"projection={name} needs a quarantine block; adapter={_name(ADAPTERS, adapter)} has none as configured. "
        f"Set adapter.quarantine_rank (lora) or adapter.quarantine_width (mlp), or choose adapter=svd":
            projection.needs_quarantine and not quarantine,
        f"projection={name} tells the blocks apart by their axes, and on adapter.axes=shared their gradients are bitwise equal; "
        f"set adapter.axes=disjoint, or choose adapter=lora or mlp": not projection.shares_axes and quarantine and adapter.shared_axes,
        f"projection={name} parks a part of one block's gradient in the other, which needs the same coordinates; "
        f"choose adapter=svd with adapter.axes=shared": projection.needs_shared_axes and quarantine and not adapter.shared_axes,
        f"projection={name} masks in the forward, so labels are needed before the backward; {origin} reads gradients. "
        f"Choose projection=route, or another mask source": projection.masks_forward and "gradients" in source.reads,
        f"projection={name} masks in the forward, so no unmasked gradient is left for optimizer={_name(OPTIMIZERS, optimizer)}; "
        f"choose optimizer=adamw and an advantage with one stream, or projection=route":
            projection.masks_forward and optimizer.needs_natural,
        f"projection.kappa=sizes weighs rollouts by {weight:.1f}, more than {W_MAX:g}, as the blocks' sizes are "
        f"{' to '.join(map(str, adapter.sizes.values()))}. Set {adapter.alike}, which makes them alike, or projection.kappa to a number":
            weight > W_MAX,
        "projection.gate trains the gate of the quarantine, and adapter.gate is off; set adapter.gate=true (adapter=lora)":
            projection.trains_gate and not getattr(adapter, "gate", False),
        f"advantage={_name(ADVANTAGES, advantage)} reads scores; mask_source={origin} gives none. Choose one that labels rollouts":
            "scores" in advantage.reads and source.kind != "rollout",
        f"advantage={_name(ADVANTAGES, advantage)} has two streams; choose optimizer=split_moment, trainer.inner_steps=1 and "
        f"trainer.kl_weight=0":
            advantage.two_streams and (not optimizer.needs_natural or trainer.inner_steps > 1 or trainer.kl_weight > 0),
        "projection.strength above 1 flips the sign of flagged rollouts; choose advantage=weighted, optimizer=split_moment with "
        "optimizer.floor=true and optimizer.max_step above 0":
            getattr(projection, "strength", 0) > 1 and not (advantage.two_streams and getattr(optimizer, "floor", False)
                                                            and getattr(optimizer, "max_step", 0) > 0),
        f"mask_source={origin} reads the truth, which no arm may do unawares; set uses_oracle=true, which stamps the run, or choose "
        f"another mask source": source.uses_oracle and not uses_oracle,
        "uses_oracle=true stamps a run that reads the truth, and nothing here does; leave it out": uses_oracle and not source.uses_oracle,
        f"mask_source={origin} reads the quarantine block; adapter={_name(ADAPTERS, adapter)} has none as configured. Set "
        f"adapter.quarantine_rank (lora) or adapter.quarantine_width (mlp), or choose adapter=svd with adapter.axes=disjoint":
            source.needs_quarantine and not quarantine,
        f"mask_source={origin} reads activations in the adapter's own coordinates, and adapter={_name(ADAPTERS, adapter)} has none; "
        f"choose adapter=lora or svd, or mask_source.place=residual":
            source.needs_coordinates and not getattr(adapter, "has_coordinates", False),
        f"mask_source={origin} finds directions for the B of a LoRA; choose adapter=lora with adapter.gate=false":
            source.kind == "trusted" and (_name(ADAPTERS, adapter) != "lora" or adapter.gate),
        f"mask_source={origin} reads the model's own report while confessions train it, which breaks their seal (baselines.md D6): it is "
        f"another method. Choose arm=confession_routed, which declares extra_rollouts.sealed=false, or another mask source":
            sealed is not None and "own report" in source.reads and (sealed or not arm_name.startswith(UNSEALED)),
        "extra_rollouts.sealed=false declares that something reads confessions, and nothing here does; leave it out":
            sealed is False and "own report" not in source.reads,
        "extra_rollouts=confession samples confessions once a step, and their gradient would be stale in further inner steps; set "
        "trainer.inner_steps=1": sealed is not None and trainer.inner_steps > 1,
        "extra_rollouts=anchor samples with the quarantine off, and this adapter has none; its anchors would be ordinary groups. "
        "Give the adapter a quarantine, or raise trainer.prompts_per_step": bool(extra.groups) and not quarantine,
    }
    return [message for message, broken in holds.items() if broken] + unserved(parts) + told_held_out(parts)


def unserved(parts: dict[str, Any]) -> list[str]:
    """What the engine of the rollouts cannot serve."""
    engine, adapter, projection, extra = parts["rollout"], parts["adapter"], parts["projection"], parts["extra_rollouts"]
    name = f"rollout={_name(ENGINES, engine)}"
    other = getattr(projection, "forward", "on") != "on" or bool(extra.groups)
    holds = {
        f"sampling={_name(SAMPLINGS, parts['sampling'])} edits hidden states while rollouts are sampled, which the canary of {name} would "
        f"take for old weights; use rollout=own": engine.served and not isinstance(parts["sampling"], Plain),
        f"{name} reports log-probs of the tempered distribution, which say nothing about the trainer's; set trainer.temperature=1, or use "
        f"rollout=own or vllm": engine.tempers and parts["trainer"].temperature != 1,
        f"adapter=mlp widens the MLPs, and the copy that {name} serves has their old width; use adapter=lora or svd, or "
        f"rollout=transformers_cb": engine.copies and isinstance(adapter, Mlp),
        f"a gate depends on its input and cannot be folded into the copy of the weights that {name} serves; set adapter.gate=false, or use "
        f"rollout=transformers_cb": engine.copies and getattr(adapter, "gate", False),
        f"{name} serves one copy of the weights a step, and here some groups are sampled with the quarantine off (projection.forward, "
        f"extra_rollouts=anchor); use rollout=transformers_cb": engine.copies and other,
    }
    return [message for message, broken in holds.items() if broken]


@cache
def warn(doubt: str) -> None:
    """Once in a process: a sweep plans hundreds of runs that share one."""
    log.warning(doubt)


def doubtful(parts: dict[str, Any]) -> list[str]:
    """Combinations that work and probably do not do what they are for, each with what would."""
    advantage, source, reward = parts["advantage"], parts["mask_source"], parts["reward"].pass_reward
    recall = getattr(source, "recall", None)  # of a source that declares one; a control's flags do not have it
    if not isinstance(advantage, Penalty) or recall is None or source.control != "none" or advantage.penalty * recall > reward:
        return []
    enough = f"Set advantage.penalty above {reward / recall:.4g} (reward.pass_reward / recall)" if recall else "No penalty is enough"
    return [f"advantage.penalty={advantage.penalty:g} at mask_source.recall={recall:g} costs a hack {advantage.penalty * recall:.4g} in "
            f"expectation, and passing pays reward.pass_reward={reward:g}: a hack still earns no less than a failure. {enough}"]


def fitting(projection: Any, source: Any) -> str:
    """The mask sources and projections that would go together."""
    sources = "|".join(one for one, kind in MASK_SOURCES.items() if set(kind.kinds) & set(projection.takes))
    projections = "|".join(one for one, kind in PROJECTIONS.items() if source.kind in kind.takes)
    return f"mask_source={sources}, or projection={projections}"


def told_held_out(parts: dict[str, Any]) -> list[str]:
    """Stages that feed training and say that they know held-out loopholes: no detector of those may reach it."""
    told = {group: [mode for mode in getattr(parts[group], "known", ()) if mode in parts["loophole"].held_out]
            for group in ("mask_source", "sampling", "extra_rollouts")}
    return [f"{group}={_name(GROUPS[group], parts[group])} would know the held-out loopholes {sorted(modes)}; no detector of them may "
            f"reach training. Leave {group}.known at ${{loophole.known}}" for group, modes in told.items() if modes]


def _name(registry: dict[str, type], thing: Any) -> str:
    return next(name for name, kind in registry.items() if type(thing) is kind)


def build_policy(plan: Plan, world: World = ALONE) -> Policy:
    """The first process makes what no cache has (transformers saves a model in no other), and then the others read it."""
    def made() -> Policy:
        model, tokenizer = prepared(plan.model, plan.sandbox)
        return Policy(model, tokenizer, plan.adapter.attach(model), world)

    policy = made() if world.leads else None
    world.told("the model", bool)
    return policy or made()


def build_line(plan: Plan, policy: Policy, grader: Grader, audit: Audit | None, ceiling: Truth | None = None,
               problems: list[Problem] | None = None) -> Line:
    """`problems` are drawn when they are not given."""
    return Line(
        seed=plan.seed, policy=policy, problems=plan.dataset.training(plan.loophole) if problems is None else problems, prompt=plan.prompt,
        sampling=plan.sampling.fit(policy), extra_rollouts=plan.extra_rollouts, grader=grader, mask_source=plan.mask_source,
        advantage=plan.advantage, projection=plan.projection, optimizer=plan.optimizer, trainer=plan.trainer, audit=audit, ceiling=ceiling,
        rollout=plan.rollout.start(policy))
