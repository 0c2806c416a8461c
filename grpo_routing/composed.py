"""A plan from words on a command line, for the tools beside `python -m grpo_routing`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo_routing.build import ConfigError, Plan, plan

CONF = Path(__file__).resolve().parent.parent / "conf"


def planned(overrides: Sequence[str]) -> Plan:
    """The run that `group=option` words describe. Raises ConfigError, whoever found the fault."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", list(overrides)), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    return plan(config)
