"""What conf/hydra/launcher says, with types; a copy of it lies in every plan.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

CAUSES = ("preempted", "timed_out", "node_lost", "out_of_memory", "crashed")
STRICT = ConfigDict(extra="forbid")


class LaunchError(Exception):
    """Nothing was started, or not all of it; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class Retries:
    """How often a run may end by each cause and be started again."""

    preempted: int
    timed_out: int
    node_lost: int
    out_of_memory: int
    crashed: int
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class SlurmResources:
    """What one run asks SLURM for; conf/hydra/launcher/slurm.yaml says what each means."""

    minutes: int
    cpus: int
    gpus: int
    memory_gb: float | None
    partition: str | None
    account: str | None
    qos: str | None
    gres: str | None
    constraint: str | None
    mail_user: str | None
    mail_type: str | None
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class LocalResources:
    """What one run takes of this machine."""

    minutes: int
    gpus: int
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Slurm:
    """hydra/launcher=slurm."""

    backend: str
    submit: bool
    wait: bool
    gaps: str
    parallel: int
    poll_seconds: float
    signal_seconds: int
    max_array: int | None
    setup: list[str]
    sbatch: dict[str, Any]
    resources: SlurmResources
    by_model: dict[str, dict[str, Any]]
    by_arm: dict[str, dict[str, Any]]
    retries: Retries
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Local:
    """hydra/launcher=local."""

    backend: str
    submit: bool
    wait: bool
    gaps: str
    parallel: int
    poll_seconds: float
    gpus: list[int]
    resources: LocalResources
    by_model: dict[str, dict[str, Any]]
    by_arm: dict[str, dict[str, Any]]
    retries: Retries
    __pydantic_config__ = STRICT


Settings = Slurm | Local
Resources = SlurmResources | LocalResources
BACKENDS = {"slurm": Slurm, "local": Local}


def settings_of(values: dict) -> Settings:
    """Checked settings. Raises LaunchError with everything that is wrong."""
    kind = BACKENDS.get(values["backend"]) if "backend" in values else None
    if kind is None:
        raise LaunchError(f"expected launcher.backend to be one of {', '.join(BACKENDS)}; got {values.get('backend')!r}")
    made = checked(kind, values, "launcher")
    faults = [f"launcher.gaps must be refuse or allow; got {made.gaps!r}"] if made.gaps not in ("refuse", "allow") else []
    faults += [f"launcher.{name} must be at least {least}; got {getattr(made, name)}"
               for name, least in (("parallel", 1), ("poll_seconds", 1), ("max_array", 1), ("signal_seconds", 1))
               if getattr(made, name, None) is not None and getattr(made, name) < least]
    if made.backend == "local" and made.resources.gpus > len(made.gpus):
        faults.append(f"launcher.resources.gpus is {made.resources.gpus} and launcher.gpus lists {len(made.gpus)}; name the devices")
    if faults:
        raise LaunchError("\n".join(faults))
    for table in (made.by_model, made.by_arm):
        for name, changes in table.items():
            changed(made.resources, changes, name)
    return made


_adapter = cache(TypeAdapter)  # making one takes longer than all that it checks


def checked(kind: type, values: dict, where: str) -> Any:
    """An object of `kind`. Raises LaunchError."""
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        said = [f"{'.'.join([where, *map(str, one['loc'])])}: {one['msg'].lower()}; got {one['input']!r}" for one in error.errors()]
        raise LaunchError("\n".join(said)) from error


def changed(resources: Resources, changes: dict, whose: str) -> Resources:
    """The resources with some values replaced. Raises LaunchError for a key that there is not."""
    legal = [field.name for field in dataclasses.fields(resources)]
    if unknown := [key for key in changes if key not in legal]:
        raise LaunchError(f"resources of {whose}: {', '.join(unknown)} is none of {', '.join(legal)}")
    return checked(type(resources), dataclasses.asdict(resources) | changes, f"resources of {whose}")


def resources_of(settings: Settings, model: str, arm: str) -> Resources:
    """Those of a run: the common ones, then what its model needs, then its arm."""
    made = settings.resources
    for table, name in ((settings.by_model, model), (settings.by_arm, arm)):
        if name in table:
            made = changed(made, table[name], name)
    return made
