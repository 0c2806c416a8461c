"""The single entry point: `python -m grpo_routing [group=option …]` runs once, `-m` sweeps."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from grpo_routing.build import ConfigError
from grpo_routing.run import run


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except ConfigError as error:
        print(f"config refused:\n{error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
