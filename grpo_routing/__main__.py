"""The single entry point: `python -m grpo_routing [group=option …]` runs once, `-m` sweeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from grpo_routing.build import ConfigError
from grpo_routing.parallel import place_of
from grpo_routing.run import run

CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def job(config: DictConfig) -> None:
    try:
        run(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except (ConfigError, OmegaConfBaseException) as error:
        print(f"config refused:\n{error}", file=sys.stderr)
        raise SystemExit(2) from None


def legal_keys(words: list[str]) -> str:
    """What would have been legal for the first override that names an unknown key; empty when no key is unknown.

    Hydra says only that the key is not there, so the config is composed again without the sweep and asked.
    """
    overrides = [one for one in words if "=" in one and not one.startswith("-")]
    simple = [parsed.input_line for parsed in OverridesParser.create().parse_overrides(overrides) if not parsed.is_sweep_override()]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            hydra.compose("config", simple)
        except HydraException as error:
            if isinstance(error.__cause__, ConfigKeyError) or "not in struct" in str(error.__cause__):
                node, _, _ = str(error.__cause__.full_key).rpartition(".")
                whole = hydra.compose("config", [one for one in simple if not one.startswith(f"{error.__cause__.full_key}=")])
                keys = OmegaConf.select(whole, node) if node else whole
                if isinstance(keys, DictConfig):
                    return f"{node or 'the config'} has: {', '.join(sorted(map(str, keys)))}"
    return ""


def main() -> None:
    if {"-m", "--multirun"} & set(sys.argv) and place_of(os.environ):
        print("expected one run in several processes; got a sweep (-m). Start sweeps without torchrun or srun: with resources.gpus above 1 "
              "the launchers give each run its processes (docs/slurm.md)", file=sys.stderr)
        raise SystemExit(2)
    try:
        job()
    except SystemExit as stop:
        if stop.code == 1 and (legal := legal_keys(sys.argv[1:])):
            print(legal, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
