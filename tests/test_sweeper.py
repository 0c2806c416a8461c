"""Claims about `-m`: every run is planned before the first one, and no treatment goes without its negative control."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import open_dict

from grpo_routing import build
from tests.conftest import CONF, SMOKE


@pytest.fixture(scope="module")
def plugin():
    """The module as Hydra has it: its search for plugins runs every one anew."""
    Plugins.instance()
    from hydra_plugins import controlled_sweeper

    return controlled_sweeper


@pytest.fixture(scope="module")
def jobs(cache):
    """jobs(*words, controls=...) -> the jobs of that sweep beyond the smoke settings, each as text; by the sweeper that Hydra makes."""
    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    composed = loader.load_configuration("config", [], RunMode.MULTIRUN)

    def made(*words, controls=None) -> list[str]:
        common, config = [*SMOKE, f"cache={cache}"], deepcopy(composed)
        if controls:
            with open_dict(config):
                config.hydra.sweeper.controls = controls
        context = HydraContext(loader, Callbacks())
        sweeper = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=print, config=config)
        (batch,) = sweeper.split_arguments(OverridesParser.create(config_loader=loader).parse_overrides([*common, *words]), None)
        return [" ".join(job[len(common) :]) for job in batch]

    return made


def test_a_treatment_gets_the_control_of_its_source(jobs):
    assert jobs("arm=filter", "loophole=held_out") == [
        "arm=filter loophole=held_out", "arm=filter loophole=held_out mask_source.control=rate_matched"]
    assert jobs("arm=erase") == ["arm=erase", "arm=erase mask_source.control=random"]


def test_a_control_that_is_there_is_not_added(jobs):
    """By what it computes, not by its name: an arm that is the control, or the word itself, in any order."""
    assert jobs("arm=erase,erase_random") == ["arm=erase", "arm=erase_random"]
    assert jobs("arm=filter", "mask_source.control=rate_matched,none") == [
        "arm=filter mask_source.control=rate_matched", "arm=filter mask_source.control=none"]


def test_recipes_that_differ_in_their_name_only_share_a_control(jobs):
    assert jobs("arm=filter", "arm_name=one,two") == [
        "arm=filter arm_name=one", "arm=filter arm_name=two", "arm=filter arm_name=two mask_source.control=rate_matched"]


def test_what_is_no_treatment_gets_nothing(jobs):
    """A source that only measures, the oracle, and a control, whichever."""
    assert jobs("arm=vanilla,ceiling") == ["arm=vanilla", "arm=ceiling"]
    assert jobs("arm=erase", "mask_source.control=shuffled") == ["arm=erase mask_source.control=shuffled"]


def test_whether_labels_act_is_read_off_the_advantage_too(config, plugin):
    plans = {words: build.plan(config(*words)) for words in (
        ("mask_source=detector",), ("mask_source=detector", "advantage=penalty"), ("arm=tdga",), ("arm=half_ablation",))}
    assert list(map(plugin.controls_of, plans.values())) == [{}, {"mask_source": "rate_matched"}, {"mask_source": "random"}, {}]


def test_suppressed_sampling_gets_a_random_direction_beside_it(jobs):
    assert jobs("arm=suppression") == ["arm=suppression", "arm=suppression sampling.control=haar"]
    assert jobs("arm=suppression,suppression_random") == ["arm=suppression", "arm=suppression_random"]
    assert jobs("arm=filter", "sampling=suppressed") == ["arm=filter sampling=suppressed", *(
        f"arm=filter sampling=suppressed {word}" for word in ("mask_source.control=rate_matched", "sampling.control=haar"))]


def test_a_recipe_is_everything_but_names(config, plugin):
    one, recipe = config("arm=erase"), plugin.recipe
    assert recipe(one) == recipe(one | {"arm_name": "x", "experiment_name": "y", "output": "z", "cache": "c", "logger": {"name": "wandb"}})
    assert recipe(one) != recipe(one | {"seed": 1}) != recipe(one | {"seed": 2})


def test_refuse_lists_what_is_missing_and_none_adds_nothing(jobs):
    with pytest.raises(HydraException) as error:
        jobs("arm=filter", "seed=0,1", controls="refuse")
    said = str(error.value)
    assert "the sweep lacks 2 controls; add them, or set hydra.sweeper.controls=add or none:" in said
    assert all(f"arm=filter seed={seed} mask_source.control=rate_matched" in said for seed in (0, 1))
    assert jobs("arm=filter", controls="none") == ["arm=filter"]
    with pytest.raises(HydraException, match="hydra.sweeper.controls must be one of add, refuse, none; got 'some'"):
        jobs("arm=filter", controls="some")


def test_a_bad_run_ends_the_sweep_before_its_first_with_all_problems(jobs):
    with pytest.raises(HydraException) as error:
        jobs("arm=filter", "trainer.group=4,1,0")
    said = str(error.value)
    assert said.startswith("the sweep was refused before its first run:") and "trainer.group=4" not in said
    assert all(f"arm=filter trainer.group={bad}: trainer.group must be at least 2; got {bad}" in said for bad in (1, 0))
