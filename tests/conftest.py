"""What several claims need: a composed config, and a tiny policy whose adapter is off its starting point."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache as cache_calls
from pathlib import Path

import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode

from grpo_routing import build
from hydra_plugins.sweep_configs import Composer

torch.set_num_threads(1)  # two threads on vectors this small cost more than they bring, and more still beside other work
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

CONF = Path(__file__).resolve().parent.parent / "conf"
SMOKE = ("model=tiny_random", "trainer=smoke", "evaluation=smoke")


LONG = ("test_resume", "test_wall", "test_launchers", "test_docs")  # files that take minutes, few tests each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a worker that meets one at the end works alone for minutes."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def config(cache):
    """config(*overrides) -> resolved config of a smoke-sized run, as a dict."""

    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    composer = Composer(loader, loader.load_configuration("config", [], RunMode.MULTIRUN))  # Hydra takes longer than a run of these tests

    @cache_calls
    def made(*overrides: str) -> dict:
        return composer((*SMOKE, f"cache={cache}", *overrides)).config

    return lambda *overrides: deepcopy(made(*overrides))


@pytest.fixture
def tiny_policy(config):
    """tiny_policy(adapter, *overrides) -> an untrained policy in float64 with random nonzero adapter parameters."""

    def make(adapter: str = "lora", *overrides: str, seed: int = 0) -> build.Policy:
        policy = build.build_policy(build.plan(config(f"adapter={adapter}", *overrides)))
        policy.model.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in policy.adapter.state().values():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        return policy

    return make
