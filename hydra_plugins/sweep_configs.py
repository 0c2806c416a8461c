"""The resolved configs of a sweep's jobs, a thousand of them in seconds.

Hydra needs a fifth of a second to compose one job, nearly all of it for finding and merging files, which depends on the chosen files
only. So each choice of files is composed once, and a job's values (seed=3, trainer.steps=60) are put into a copy of it, by
Hydra's own function and in the order in which Hydra would.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, Node, OmegaConf, ValueNode, open_dict
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class Composed:
    """A job of a sweep: its words, its resolved config, and which file it took from every group."""

    words: tuple[str, ...]
    config: dict
    choices: dict[str, str]


class Composer:
    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master, self.parse = loader, master, cache(OverridesParser.create(loader).parse_override)
        self.bases: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}
        self.scalars = {key for key in master if key != "hydra" and not OmegaConf.is_config(master[key])}

    def __call__(self, words: tuple[str, ...]) -> Composed:
        """Raises HydraException or OmegaConfBaseException for what cannot be composed, a missing value included."""
        parsed = [self.parse(word) for word in words]
        values = [one for one in parsed if self._is_value(one)]
        files = tuple(one.input_line for one in parsed if not self._is_value(one))
        if files not in self.bases:
            self.bases[files] = self._base(files)
        base, choices = self.bases[files]
        before = {one.key_or_group: node(base, one.key_or_group) for one in values}
        if not all(isinstance(leaf, ValueNode) for leaf in before.values()):  # a list, or a key that is not there: too much to put back
            base, before = copy.deepcopy(base), {}
        raw = {key: leaf._value() for key, leaf in before.items()}
        try:
            ConfigLoaderImpl._apply_overrides_to_config(values, base)
            return Composed(words, OmegaConf.to_container(base, resolve=True, throw_on_missing=True), choices)
        finally:
            for key, leaf in before.items():
                leaf._set_value(raw[key])
                node(base, key.rpartition(".")[0])._set_item_impl(key.rpartition(".")[2], leaf)

    def _is_value(self, one: Override) -> bool:
        """Whether the word changes a value and cannot choose a file. In doubt it does not, which is slower and no less right."""
        plain = one.package is None and not one.is_add() and not one.is_delete() and not one.is_force_add()
        key = one.key_or_group
        return plain and not key.startswith("hydra") and "/" not in key and ("." in key or key in self.scalars)

    def _base(self, files: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
        made = self.loader.load_sweep_config(self.master, list(files))
        choices = OmegaConf.to_container(made.hydra.runtime.choices)
        with open_dict(made):
            del made["hydra"]
        return made, choices


def node(config: DictConfig, key: str) -> Node | None:
    """The node that a dotted key leads to, unresolved; None where there is none."""
    found: Node | None = config
    for word in filter(None, key.split(".")):
        found = found._get_node(word, throw_on_missing_value=False) if isinstance(found, DictConfig) else None
    return found


def compose_all(loader: ConfigLoader, master: DictConfig, jobs: list[list[str]]) -> tuple[list[Composed], list[str]]:
    """Every job that can be composed, and what is wrong with the others."""
    composer, found, problems = Composer(loader, master), [], []
    for job in jobs:
        try:
            found.append(composer(tuple(job)))
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error
            problems.append(f"{' '.join(job)}: {' '.join(str(cause).split())}")
    return found, problems
