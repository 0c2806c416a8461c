"""Claims about configs of older code: what came since is filled in at the value that changes nothing, and nothing else is touched."""

from __future__ import annotations

from copy import deepcopy

import pytest

from grpo_routing import build, worker
from grpo_routing.arms import recipe
from grpo_routing.finished import UnusableRun, ready_plan
from grpo_routing.folder import freeze, frozen, identity
from grpo_routing.older import SINCE, UNNAMED, completed
from grpo_routing.run import run

ARMS = ("vanilla", "graft", "graft_lookalike", "penalty", "screening", "modification")


def older(config: dict) -> dict:
    """The config as code would have frozen it that knew none of SINCE."""
    config = deepcopy(config)
    for group, option, setting, _ in SINCE:
        if not setting:
            config.pop(group)
        elif option in ("", config.get(group, {}).get("name")):
            config[group].pop(setting, None)
    return config


@pytest.mark.parametrize("arm", ARMS)
def test_an_older_config_is_the_run_of_today(config, tmp_path, arm):
    """The same plan in every part; of an idle preparation only that it is idle."""
    today = config(f"arm={arm}")
    now, then = build.plan(today), ready_plan(older(today), tmp_path)
    assert then.model.prepare.stage == now.model.prepare.stage == "none"
    for part in ("dataset", "loophole", "reward", "projection", "mask_source", "advantage", "prompt", "sampling", "rollout",
                 "extra_rollouts", "optimizer", "adapter", "trainer", "evaluation"):
        assert getattr(then, part) == getattr(now, part), part
    assert then.model.key() == now.model.key()


@pytest.mark.parametrize("arm", ARMS)
def test_a_setting_that_changes_nothing_is_no_part_of_a_name(config, arm):
    today = config(f"arm={arm}")
    before = deepcopy(today)
    for group, option, setting, _ in UNNAMED:
        if not setting:
            del before[group]
        elif option in ("", before[group]["name"]):
            del before[group][setting]
    assert before != today
    assert identity(before) == identity(today) and recipe(before) == recipe(today)


@pytest.mark.parametrize("words", [("sampling=suppressed",), ("rollout=transformers_cb",), ("arm=screening", "advantage.label=strict"),
                                   ("model.prepare.stage=self_report_sft",)])
def test_a_setting_that_changes_something_is(config, words):
    assert identity(config(*words)) != identity(config(*words[:-1]))


def test_what_a_config_says_stays(config):
    said = config("arm=screening", "advantage.label=strict", "mask_source.forms=[plain]", "sampling=suppressed", "prompt=inoculation")
    kept = deepcopy(said)
    assert completed(said) == said == kept
    filled = completed(older(said))
    assert filled["advantage"]["label"] == "loose" and filled["mask_source"]["forms"] == ["plain", "other"]


def test_what_has_no_such_value_is_still_refused(config, tmp_path):
    old = config("arm=graft")
    del old["mask_source"]["control"]
    with pytest.raises(UnusableRun, match="mask_source.control is missing"):
        ready_plan(old, tmp_path)


def test_a_run_that_older_code_planned_is_run_by_this_code(config, tmp_path):
    """A sweep goes on after an update: the folder keeps the config that it was planned with, and the run is the one of today's config."""
    today = config("arm=vanilla", f"output={tmp_path / 'today'}")
    folder = tmp_path / "planned"
    freeze(folder, older(today))
    assert worker.main([str(folder)]) == 0
    assert frozen(folder) == older(today)
    assert (run(today) / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()


def test_what_this_code_cannot_run_names_the_way_out(config, tmp_path, capsys):
    old = config("arm=graft")
    del old["mask_source"]["control"]
    freeze(tmp_path, old)
    assert worker.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "mask_source.control is missing" in said and "plan.json" in said
