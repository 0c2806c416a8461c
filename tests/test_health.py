"""The tripwire: what stops a run, what does not, and what becomes of a run that it stopped."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch

from grpo_routing import build
from grpo_routing import run as running
from grpo_routing.files import Record
from grpo_routing.folder import run_folder
from grpo_routing.health import Tripwire
from grpo_routing.policy import inverse_transform
from grpo_routing.run import run
from tests.conftest import CONF

TRIPWIRE = Tripwire(dead_groups_steps=3, saturated_at=0.5, least_format=0.2, format_steps=4)
DEAD = {"train/flat_groups": 1.0, "train/passed": 0.0, "train/format": 1.0}
ALIVE = {"train/flat_groups": 0.5, "train/passed": 0.5, "train/format": 1.0}


def rows(*steps: dict) -> list[dict]:
    return [{"step": number} | step for number, step in enumerate(steps)]


def formats(*values: float) -> list[dict]:
    return rows(*(ALIVE | {"train/format": value} for value in values))


# ------------------------------------------------------------------------------------------------ the rules


def test_flat_groups_of_a_policy_that_does_not_pass_are_dead_after_that_many_steps_in_a_row():
    assert TRIPWIRE.cause(rows(DEAD, DEAD)) is None
    assert TRIPWIRE.cause(rows(ALIVE, DEAD, DEAD | {"train/passed": 0.25}, DEAD)) == (
        "dead: all groups had equal rewards in steps 1 to 3, and 0.083 of the rollouts passed; there was nothing left to learn from")


@pytest.mark.parametrize("odd", [{"train/flat_groups": 0.875}, {"train/passed": 0.75}])
def test_one_other_step_breaks_the_row(odd):
    assert TRIPWIRE.cause(rows(DEAD, DEAD, DEAD | odd, DEAD, DEAD)) is None
    assert TRIPWIRE.cause(rows(DEAD, DEAD, DEAD | odd, DEAD, DEAD, DEAD)).startswith("dead: all groups had equal rewards in steps 3 to 5")


def test_a_saturated_run_is_not_dead():
    """A hacked policy is paid in every rollout for as long as it likes."""
    assert TRIPWIRE.cause(rows(*[DEAD | {"train/passed": 1.0}] * 200)) is None


def test_format_is_lost_when_its_mean_is_too_low():
    assert TRIPWIRE.cause(formats(0, 0, 0)) is None, "too few steps to say"
    assert TRIPWIRE.cause(formats(0, 0, 0, 0)) == (
        "format lost: 0.000 of the rollouts were usable answers in steps 0 to 3; health.least_format is 0.2")
    assert TRIPWIRE.cause(formats(1, 1, 0, 0, 0)) is None
    assert TRIPWIRE.cause(formats(0.2, 0.2, 0.2, 0.2)) is None
    assert TRIPWIRE.cause(formats(1, 0.3, 0.1, 0.2, 0.1)).startswith("format lost: 0.175 of the rollouts were usable answers in steps 1")


def test_a_noisy_step_loses_no_format():
    assert all(TRIPWIRE.cause(formats(*([0.9] * 5 + [0.0] + [0.9] * 5)[:length])) is None for length in range(1, 12))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_any_number_that_is_not_finite_fires_at_once(value):
    off = Tripwire(dead_groups_steps=0, saturated_at=0.5, least_format=0.2, format_steps=0)
    odd = rows(ALIVE, ALIVE | {"train/norm_deployed": value})
    assert {tripwire.cause(odd) for tripwire in (TRIPWIRE, off)} == {f"not finite: train/norm_deployed is {value} at step 1"}


def test_off_waits_for_nothing_else(config):
    off = build.plan(config("health=off")).health
    assert off.cause(rows(*[DEAD | {"train/format": 0.0}] * 500)) is None


@pytest.mark.parametrize(("setting", "message"), [
    ("health.format_steps=-1", "health.format_steps must be a number of steps, or 0 for never; got -1"),
    ("health.least_format=20", r"health.least_format must be a share in \[0, 1\]; got 20")])
def test_settings_that_mean_nothing_are_refused(config, setting, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config(setting))


def test_the_defaults_leave_healthy_and_saturated_curves_alone(config):
    """Rates of organism runs of 60 steps: learning, and hacking in nearly every rollout by step 30."""
    tripwire = build.plan(config()).health
    learning = [{"train/flat_groups": 0.17 + 0.04 * (i % 3), "train/passed": 0.3 + 0.01 * i, "train/format": 0.9} for i in range(60)]
    hacking = [{"train/flat_groups": min(1.0, i / 30), "train/passed": min(0.98, 0.3 + i / 40), "train/format": 0.88} for i in range(240)]
    assert all(tripwire.cause(rows(*run[:length])) is None for run in (learning, hacking) for length in range(1, len(run) + 1))


def test_it_reads_what_training_sees_and_nothing_else():
    tree = ast.parse((CONF.parent / "grpo_routing" / "health.py").read_text())
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and str(node.value).split("/")[0] in (
        "train", "rollout", "route", "audit") and "/" in str(node.value)}
    assert named == {"train/flat_groups", "train/passed", "train/format"}
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {"__future__", "dataclasses", "statistics"}


def test_a_policy_without_finite_probabilities_says_so():
    with pytest.raises(FloatingPointError, match="probabilities that are not finite"):
        inverse_transform(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), torch.tensor([0.1, 0.1]))


# ------------------------------------------------------------------------------------------------ runs

STEPS = ["trainer.steps=6", "trainer.checkpoint_every=2", "loophole=held_out", "evaluation.problems=6"]
SOON = ["health.format_steps=3", *STEPS]  # an untrained model gives no usable answer


def said(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def tree(folder: Path) -> dict[str, str]:
    """What must not depend on interruptions."""
    names = ("metrics.jsonl", "audit.jsonl", "eval/as_trained.json", "eval/as_deployed.json")
    return {name: (folder / name).read_text() for name in names}


@pytest.fixture(scope="module")
def collapsed(config, tmp_path_factory):
    """A whole run whose format is lost from the start, and its config."""
    ready = config("arm=graft", f"output={tmp_path_factory.mktemp('whole')}", *SOON)
    return run(ready), ready


def test_a_collapsed_run_stops_is_evaluated_and_says_why(collapsed):
    folder, _ = collapsed
    status = said(folder)
    assert status["state"] == "collapsed"
    assert status["cause"] == "format lost: 0.000 of the rollouts were usable answers in steps 0 to 2; health.least_format is 0.2"
    assert len(Record(folder / "metrics.jsonl").rows()) == 3
    assert (folder / "checkpoints" / "latest").read_text() == "step-000003"
    assert {file.stem for file in (folder / "eval").glob("*.json")} == {"base", "as_trained", "as_deployed"}


def test_it_is_said_loudly_and_ends_no_sweep(config, tmp_path, capsys):
    assert run(config("arm=no_loophole", f"output={tmp_path}", *SOON)).is_dir()
    loud = capsys.readouterr().err
    assert "!!! no_loophole s0 COLLAPSED. format lost: 0.000 of the rollouts" in loud and "counts in the arm" in loud


def test_running_it_again_leaves_it_alone_and_says_why(collapsed, capsys):
    folder, ready = collapsed
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    assert run(ready) == folder
    assert f"{folder}: collapsed already (format lost: 0.000" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("where", ["in training", "before the evaluation"])
def test_a_resumed_run_gives_the_same_verdict(config, tmp_path, monkeypatch, collapsed, where):
    """Stopped after its second step, or killed between the collapse and its evaluation."""
    folder, _ = collapsed
    ready = config("arm=graft", f"output={tmp_path}", *SOON)
    with monkeypatch.context() as patch:
        if where == "in training":
            step = running.train_step

            def killed(line, state):
                if state.step == 2:
                    raise KeyboardInterrupt
                return step(line, state)

            patch.setattr(running, "train_step", killed)
        else:
            def nothing(*_):
                raise KeyboardInterrupt

            patch.setattr(running, "examine_end", nothing)
        with pytest.raises(KeyboardInterrupt):
            run(ready)
    again = run_folder(ready, build.plan(ready))
    assert said(again)["state"] == "failed"
    assert run(ready) == again
    assert said(again)["cause"] == said(folder)["cause"] and said(again)["attempt"] == 2
    assert tree(again) == tree(folder)


def test_the_smoke_settings_do_not_fire(config, tmp_path):
    assert said(run(config("arm=graft", "loophole=held_out", f"output={tmp_path}")))["state"] == "done"


def test_dead_groups_stop_a_run(config, tmp_path):
    status = said(run(config("arm=no_loophole", f"output={tmp_path}", "health.dead_groups_steps=2", "health.format_steps=0", *STEPS)))
    assert status["cause"].startswith("dead: all groups had equal rewards in steps 0 to 1, and 0.000 of the rollouts passed")


def test_a_loss_that_is_not_finite_is_a_collapse(config, tmp_path, monkeypatch, capsys):
    ready, step = config("arm=graft", f"output={tmp_path}", *STEPS), running.train_step

    def diverging(line, state):
        if state.step == 3:
            raise FloatingPointError("loss is nan at step 3")
        return step(line, state)

    monkeypatch.setattr(running, "train_step", diverging)
    folder = run(ready)
    assert (said(folder)["state"], said(folder)["cause"]) == ("collapsed", "not finite in step 3: loss is nan at step 3")
    assert len(Record(folder / "metrics.jsonl").rows()) == 3 and (folder / "eval" / "as_deployed.json").exists()
    assert "COLLAPSED" in capsys.readouterr().err


def test_a_policy_that_cannot_be_sampled_is_not_evaluated(config, tmp_path, monkeypatch):
    """Its parameters are not finite after step 1; the row of that step shows it."""
    ready, step = config("arm=graft", f"output={tmp_path}", *STEPS), running.train_step

    def diverging(line, state):
        row = step(line, state)
        if state.step == 2:
            with torch.no_grad():
                for tensor in line.policy.adapter.state().values():
                    tensor.fill_(math.nan)
            row |= {f"train/norm_{block}": line.policy.adapter.norm(block) for block in line.policy.adapter.blocks}
        return row

    monkeypatch.setattr(running, "train_step", diverging)
    folder = run(ready)
    assert said(folder)["state"] == "collapsed"
    assert said(folder)["cause"] == (
        "not finite: train/norm_deployed is nan, train/norm_quarantine is nan at step 1. It cannot be evaluated: the policy gives "
        "probabilities that are not finite; its parameters or activations have diverged. Lower optimizer.lr")
    assert {file.stem for file in (folder / "eval").glob("*.json")} == {"base"}
