"""Claims about runs that are killed, stopped, repeated: nothing is lost and nothing changes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grpo_routing import build
from grpo_routing import run as running
from grpo_routing.folder import identity, run_folder
from grpo_routing.run import Stopped, run
from tests.warm import Entry

STEPS = 6
RECORDS = ("metrics.jsonl", "audit.jsonl", "rollouts.jsonl", "scores.jsonl")


ARMS = {
    "route": ["mask_source.refresh_every=3"],
    # An untrained model neither earns nor hacks: random flags, and a penalty that makes them an advantage, so that the memory of
    # the mask source and the split moments hold something to lose.
    "graft_lookalike": ["mask_source.false_positive=0.5", "mask_source.pilot=2", "advantage=penalty"],
    # Confessions that can be read, and a judge whose flags mean nothing: the adapter learns from them alone.
    "confession": ["mask_source=detector", "extra_rollouts.judge.false_positive=0.5",
                   "model.prepare.stage=self_report_sft", "model.prepare.samples=256",
                   "model.prepare.epochs=4", "model.prepare.lr=0.01", "model.prepare.mask_turn1=true", "extra_rollouts.balanced=false"],
}


def overrides(output: Path, cache: str, arm: str = "route") -> list[str]:
    return ["model=tiny_random", "trainer=smoke", "evaluation=smoke", "dataset.train_problems=100", f"arm={arm}",
            "loophole=held_out", f"trainer.steps={STEPS}", "trainer.checkpoint_every=2", "experiment_name=e",
            f"output={output}", f"cache={cache}", *ARMS[arm]]


def launch(output: Path, cache: str, arm: str = "route") -> Entry:
    return Entry(overrides(output, cache, arm), output / f"said-{time.monotonic_ns()}.txt")


def wait_for_step(folder: Path, step: int, process: Entry) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list(folder.glob("e/runs/*/metrics.jsonl"))
        if found and len(found[0].read_text().splitlines()) >= step:
            return
        assert process.running(), process.said
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within two minutes")


def result(output: Path) -> tuple[dict, dict[str, str], dict[str, str]]:
    (folder,) = output.glob("e/runs/*")
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    weights = load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    evaluations = {file.name: file.read_text() for file in sorted((folder / "eval").glob("*.json"))}
    return weights, {name: (folder / name).read_text() for name in RECORDS}, evaluations


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """uninterrupted(arm) -> what the arm's whole run left behind."""

    @lru_cache
    def whole(arm: str):
        output = tmp_path_factory.mktemp("whole")
        process = launch(output, cache, arm)
        assert process.wait() == 0, process.said
        return result(output)

    return whole


def same(one, other) -> bool:
    weights, records, evaluations = one
    return (weights.keys() == other[0].keys() and all((tensor == other[0][key]).all() for key, tensor in weights.items())
            and records == other[1] and evaluations == other[2])


@pytest.mark.parametrize(("arm", "at"), [
    ("route", 1), *(pytest.param("route", at, marks=pytest.mark.slow) for at in (3, 4)), ("graft_lookalike", 3), ("confession", 3)])
def test_a_run_killed_without_notice_ends_as_if_uninterrupted(tmp_path, cache, uninterrupted, arm, at):
    process = launch(tmp_path, cache, arm)
    wait_for_step(tmp_path, at, process)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = launch(tmp_path, cache, arm)
    assert again.wait() == 0, again.said
    assert same(result(tmp_path), uninterrupted(arm))
    (folder,) = tmp_path.glob("e/runs/*")
    assert len(list((folder / "attempts").glob("*.json"))) == 2


def test_the_resumed_look_alike_run_had_something_to_lose(uninterrupted):
    """The probe from the pilot, moments of both blocks, and parameters that moved."""
    weights, _, _ = uninterrupted("graft_lookalike")
    assert weights["memory/weights"].any() and weights["memory/threshold"].isfinite()
    for block in ("deployed", "quarantine"):
        assert any(value.any() for key, value in weights.items() if key.startswith(f"optimizer/{block}/") and key.endswith("/first"))
        assert any(value.any() for key, value in weights.items() if key.startswith(f"adapter/{block}/") and key.endswith("/B"))


def test_the_resumed_confessing_run_had_something_to_lose(uninterrupted):
    weights, records, _ = uninterrupted("confession")
    assert all(json.loads(row)["confession/gradient_norm"] > 0 for row in records["metrics.jsonl"].splitlines())
    assert any(value.any() for key, value in weights.items() if key.startswith("adapter/deployed/") and key.endswith("/B"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_signal_stops_at_a_step_boundary_with_a_checkpoint(tmp_path, cache, uninterrupted, number):
    process = launch(tmp_path, cache)
    wait_for_step(tmp_path, 1, process)
    process.signal(number)
    (folder,) = tmp_path.glob("e/runs/*")
    assert process.wait() == 143, process.said
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{steps:06d}" and 1 <= steps < STEPS
    again = launch(tmp_path, cache)
    assert again.wait() == 0 and f"resuming at step {steps}" in again.said
    assert same(result(tmp_path), uninterrupted("route"))


LATE = """
import os, signal, threading
from grpo_routing.run import STOP_SIGNALS, stop_signals
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as a launcher starts a worker
with stop_signals() as asked:
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # as torch's threads start: with the signals let in
    assert not asked()
for number in STOP_SIGNALS:
    os.kill(os.getpid(), number)
print("done")
"""


def test_a_signal_that_comes_after_the_last_step_ends_nothing():
    """SLURM may warn while a finished run's process goes down; ended by the signal, it would be taken for a crash."""
    ended = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("asked", [3, 4])
def test_a_run_that_is_stopped_before_an_evaluation_on_the_way_makes_it_when_resumed(config, tmp_path, monkeypatch, asked):
    """Once before the base's evaluation, then after each step, and before each evaluation it is asked whether to stop: the third time is
    after step 2, when the checkpoint is there, the fourth at the door of its evaluation."""
    words = ("arm=vanilla", "experiment_name=e", "trainer.steps=4", "trainer.checkpoint_every=2", "evaluation.every=2",
             "evaluation.problems=8")
    whole = run(config(*words, f"output={tmp_path / 'whole'}"))
    times = iter(range(1, 99))
    with monkeypatch.context() as patched:
        patched.setattr(running, "stop_signals", lambda: nullcontext(lambda: next(times) == asked))
        with pytest.raises(Stopped):
            run(config(*words, f"output={tmp_path / 'stopped'}"))
    (folder,) = tmp_path.glob("stopped/e/runs/*")
    assert (folder / "checkpoints" / "latest").read_text() == "step-000002"
    assert not (folder / "eval" / "step-000002-as_deployed.json").exists()
    run(config(*words, f"output={tmp_path / 'stopped'}"))
    for name in ("step-000002-as_deployed", "as_deployed"):
        assert (folder / "eval" / f"{name}.json").read_bytes() == (whole / "eval" / f"{name}.json").read_bytes()


def test_a_finished_run_is_left_alone(config, tmp_path, capsys):
    ready = config("arm=no_loophole", f"output={tmp_path}")
    folder = run(ready)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    assert run(ready) == folder
    assert "done already" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_where_things_go_is_not_part_of_a_runs_identity(config):
    base = config()
    assert identity(base) == identity(config("logger=wandb", "output=/elsewhere", "experiment_name=other", "cache=/other"))
    assert identity(base) != identity(config("seed=1"))
    assert identity(base) != identity(config("optimizer.lr=0.1"))


def test_a_folder_that_holds_another_config_is_refused(config, tmp_path):
    ready = config(f"output={tmp_path}")
    folder = run_folder(ready, build.plan(ready))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\n")
    with pytest.raises(FileExistsError, match=r"holds another config; move it away or rename the experiment"):
        run(ready)


def test_a_failed_run_keeps_its_traceback_and_fails_loudly(config, tmp_path):
    ready = config("arm=no_loophole", f"output={tmp_path}")
    folder = run_folder(ready, build.plan(ready))
    folder.mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step-000099")  # a checkpoint that is gone
    with pytest.raises(FileNotFoundError):
        run(ready)
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "step-000099" in status["error"] and "Traceback" in status["traceback"]


def test_stopped_exits_like_sigterm():
    assert Stopped().code == 143
