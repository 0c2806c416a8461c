"""Publishing an experiment to W&B: every run once, from merged files, under one id; what changed again; nothing about the machine."""

from __future__ import annotations

import getpass
import json
import re
import sys
from pathlib import Path

import pytest

from grpo_routing import wandb_sync
from grpo_routing.files import Record, claimed, write_json
from grpo_routing.log import WandbLogger
from grpo_routing.results import read_run
from grpo_routing.wandb_run import Target, publication
from tests.wandb_files import told, write_run
from tests.wandb_server import stand_in

WORDS = ["loophole=held_out", "cache=/home/me/cache", "output=/home/me/outputs", "trainer.steps=4"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No W&B account of whoever runs the tests, and no network."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(home))
        yield


def synced(*words: str) -> int:
    return wandb_sync.main([*words, "--mode", "offline"])


@pytest.fixture(scope="module")
def experiment(config, tmp_path_factory) -> Path:
    """A finished method, a run that trains, one that collapsed, one that failed, one that did not start; all published offline."""
    experiment = tmp_path_factory.mktemp("outputs") / "modes"
    write_run(experiment, config("arm=graft", *WORDS, "mask_source.recall=0.5"))
    write_run(experiment, config("arm=vanilla", *WORDS, "seed=1"), state="running", done=3)
    write_run(experiment, config("arm=erase", *WORDS, "seed=2"), state="collapsed", done=3)
    write_run(experiment, config("arm=route", *WORDS), state="failed", done=3)
    (experiment / "runs" / "penalty-new").mkdir()
    assert synced(str(experiment)) == 0
    return experiment


def run_of(experiment: Path, arm: str) -> Path:
    (folder,) = (experiment / "runs").glob(f"{arm}-*")
    return folder


def files(experiment: Path) -> dict[Path, int]:
    """When each was written last; W&B's own process writes its logs later."""
    return {file: file.stat().st_mtime_ns for file in experiment.rglob("*")
            if file.is_file() and file.suffix != ".log" and file.name != ".wandb.lock"}


# ------------------------------------------------------------------------------------------------ what is published


def test_the_config_has_flat_keys_to_group_by(experiment):
    config = told(run_of(experiment, "graft")).config
    flat = {name: value for name, value in config.items() if not isinstance(value, dict)}
    assert re.fullmatch("[0-9a-f]{8}", flat.pop("recipe"))
    assert flat == {
        "arm": "graft", "role": "method", "control": "none", "seed": 0, "recall": 0.5, "model": "tiny_random", "loophole": "held_out",
        "projection": "route", "mask_source": "detector", "adapter": "lora", "advantage": "balanced", "prompt": "plain",
        "sampling": "plain", "extra_rollouts": "anchor", "optimizer": "split_moment", "held_out": "file_marker", "pays": True,
        "uses_oracle": False, "imitation": False, "code": "c" * 10, "status": "done"}
    assert config["settings"]["trainer"]["steps"] == 4
    assert not {"output", "cache", "logger", "experiment_name"} & {*config["settings"], *config["settings"]["model"]}
    assert config["settings"]["mask_source"]["known"] == "run_tests,sentinel,stdout_marker"  # one word, so that it groups


def test_seeds_share_their_recipe_and_nothing_else_does(config, tmp_path):
    words = {"a": ["seed=0"], "b": ["seed=1"], "c": ["seed=0", "optimizer.lr=0.5"]}
    made = {name: write_run(tmp_path / name, config("arm=erase", *WORDS, *more)) for name, more in words.items()}
    recipes = {name: publication(folder, read_run(folder)).config["recipe"] for name, folder in made.items()}
    assert recipes["a"] == recipes["b"] != recipes["c"]


def test_group_job_type_and_tags(experiment, config, tmp_path):
    start = told(run_of(experiment, "graft")).start
    assert (start.run_group, start.job_type, set(start.tags)) == ("modes", "graft", {"graft", "held_out", "method"})
    cheat = write_run(tmp_path, config("arm=ceiling", *WORDS))
    assert publication(cheat, read_run(cheat)).tags == ("ceiling", "held_out", "method", "uses_oracle")


def test_evaluations_stand_at_the_steps_that_had_trained_the_policy(experiment):
    rows = {row["trainer/step"]: row for row in told(run_of(experiment, "graft")).history}
    assert list(rows) == [0, 1, 2, 3, 4]
    hacks = {(step, name): value for step, row in rows.items() for name, value in row.items() if name.endswith("/hack")}
    assert hacks == {(0, "eval/base/hack"): 0.1, (2, "eval/as_deployed/hack"): 0.7, (4, "eval/as_trained/hack"): 0.9,
                     (4, "eval/as_deployed/hack"): 0.3, (0, "audit/hack"): 0.0, (1, "audit/hack"): 0.1, (2, "audit/hack"): 0.2,
                     (3, "audit/hack"): 0.3}


def test_the_summary_is_how_the_run_ended(experiment):
    summary = {arm: told(run_of(experiment, arm)).summary for arm in ("graft", "vanilla")}
    assert summary["graft"]["eval/as_deployed/hack"] == 0.3 and summary["graft"]["steps"] == 4
    assert summary["graft"]["last5_hack"] == pytest.approx(0.15) and summary["graft"]["last5_solve"] == 0.5
    assert "eval/as_deployed/hack" not in summary["vanilla"], "an evaluation on the way is no end"
    assert "eval/as_deployed/hack" in {name for row in told(run_of(experiment, "vanilla")).history for name in row}
    defined = {metric.name: metric for metric in told(run_of(experiment, "vanilla")).kind("metric")}
    assert defined["eval/as_deployed/hack"].summary.none and not defined["audit/hack"].summary.none


def test_a_run_that_is_not_finished_is_published_so_far_and_fails_in_the_eyes_of_wandb(experiment):
    ends = {arm: (told(run_of(experiment, arm)).config["status"], told(run_of(experiment, arm)).kind("exit")[0].exit_code)
            for arm in ("graft", "vanilla", "erase")}
    assert ends == {"graft": ("done", 0), "vanilla": ("running", 1), "erase": ("collapsed", 1)}  # that one has no last evaluation
    assert len(told(run_of(experiment, "vanilla")).history) == 3
    assert told(run_of(experiment, "erase")).config["cause"] == "format below 0.2"


def test_nothing_tells_of_the_machine(experiment):
    for arm in ("graft", "vanilla", "erase", "route"):
        (store,) = run_of(experiment, arm).glob("wandb/*run-*/*.wandb")
        words, start = store.read_bytes(), told(run_of(experiment, arm)).start
        for secret in ("/home/me", "my-machine", "x.py", str(experiment), str(Path.cwd()), f"/{getpass.getuser()}/", sys.executable):
            assert secret.encode() not in words, secret
        assert (start.host, start.git.remote_url, start.git.commit) == ("", "", "")
        assert told(run_of(experiment, arm)).kind("environment") == []
        sent = [file.relative_to(store.parent / "files") for file in (store.parent / "files").rglob("*") if file.is_file()]
        assert {file.parts[0] for file in sent} == {"media"}  # the table


# ------------------------------------------------------------------------------------------------ exactly once


def test_a_second_call_publishes_nothing_and_touches_nothing(experiment, capsys):
    before = files(experiment)
    assert synced(str(experiment)) == 0
    assert files(experiment) == before
    assert capsys.readouterr().out == (
        "penalty-new: nothing to publish yet, it has not started\n"
        f"{experiment}: 1 empty, 4 unchanged\n"
        f"upload with: wandb sync {experiment}/runs/*/wandb/offline-run-*\n")


def test_what_changed_is_published_again_under_its_id(config, tmp_path, capsys):
    kept, grown = (write_run(tmp_path / "x", config("arm=erase", *WORDS, f"seed={seed}"), state="running", done=3) for seed in (0, 1))
    assert synced(str(tmp_path / "x")) == 0
    before, first = files(kept), told(grown).start.run_id
    Record(grown / "metrics.jsonl").append([{"step": 3, "train/reward": 0.5}])
    capsys.readouterr()
    assert synced(str(tmp_path / "x")) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{grown.name}: published, running so far: 4 of 4 steps", f"{tmp_path}/x: 1 published, 1 unchanged"]
    assert files(kept) == before
    assert told(grown).start.run_id == first != told(kept).start.run_id
    assert [row["trainer/step"] for row in told(grown).history] == [0, 1, 2, 3]


def test_another_place_is_another_publication(config, tmp_path, capsys):
    write_run(tmp_path / "x", config("arm=erase", *WORDS))
    for words, count in ((), "1 published"), (("--project", "p"), "1 published"), (("--project", "p", "--entity", "e"), "1 published"), (
            ("--project", "p", "--entity", "e"), "1 unchanged"):
        assert synced(str(tmp_path / "x"), *words) == 0
        assert f"{tmp_path}/x: {count}\n" in capsys.readouterr().out
    start = told(run_of(tmp_path / "x", "erase")).start
    assert (start.project, start.entity) == ("p", "e")


def test_what_a_run_published_itself_is_not_published_again(config, tmp_path, capsys):
    folder = write_run(tmp_path / "x", config("arm=erase", *WORDS, "logger=wandb"), state="running")
    for state in ("as_trained", "as_deployed"):
        write_json(folder / "eval" / f"{state}.json", json.loads((folder / "eval" / "base.json").read_text()))
    WandbLogger("grpo_routing", "offline").publish(folder, cause=None)
    write_json(folder / "status.json", {"state": "done"})  # which run.py says last
    assert synced(str(tmp_path / "x")) == 0
    assert f"{tmp_path}/x: 1 unchanged\n" in capsys.readouterr().out


def test_online_a_run_is_sent_whole_once_and_the_next_call_sends_nothing(config, tmp_path):
    """To a stand-in: what the client sends, and not what W&B makes of it."""
    folder = write_run(tmp_path / "x", config("arm=erase", *WORDS))
    with stand_in() as server:
        assert server.run("wandb_sync", str(tmp_path / "x"), "--entity", "team") == (
            f"{folder.name}: published, done\n{tmp_path}/x: 1 published\n")
        first, sent = server.variables("UpsertBucket")[0], len(server.asked)
        assert (first["name"], first["project"], first["entity"], first["groupName"], first["displayName"], first["jobType"]) == (
            publication(folder, read_run(folder)).id, "grpo_routing", "team", "x", folder.name, "erase")
        assert not first["host"] and not first["commit"] and not first["repo"]
        rows = [row for row in server.history if "trainer/step" in row]
        assert [(row["trainer/step"], row.get("train/reward")) for row in rows] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, None)]
        assert json.loads(server.files["wandb-summary.json"])["eval/as_deployed/hack"] == 0.3
        assert {name.split("_")[0] for name in server.files} == {"wandb-summary.json", "config.yaml", "media/table/completions"}
        assert server.run("wandb_sync", str(tmp_path / "x"), "--entity", "team") == f"{tmp_path}/x: 1 unchanged\n"
        assert {operation for operation, _ in server.asked[sent:]} == {"Viewer"}


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_failure_is_said_hides_no_other_run_and_leaves_no_receipt(config, tmp_path, capsys):
    torn, held, fine = (write_run(tmp_path / "x", config("arm=erase", *WORDS, f"seed={seed}")) for seed in (0, 1, 2))
    (torn / "eval" / "as_deployed.json").write_text('{"rates": ')
    with claimed(held / ".wandb.lock", patience=0):
        assert synced(str(tmp_path / "x")) == 1
    said = capsys.readouterr()
    assert f"{tmp_path}/x: 2 failed, 1 published\n" in said.out
    first, second = said.err.splitlines()
    assert first.endswith(". Mend that and call again: what is published stays")
    said_of = "FAILED: expected to publish it, but"
    assert first.startswith(f"{torn.name}: {said_of} ReportError: expected JSON in {torn}/eval/as_deployed.json, but ")
    assert second.startswith(f"{held.name}: {said_of} Held: {held} is being worked on by process ")
    assert [folder.name for folder in (torn, held, fine) if (folder / "wandb" / "receipt.json").exists()] == [fine.name]
    assert synced(str(tmp_path / "x"), "--project", "no/slash", "--only", fine.name) == 1
    assert "no/slash" in capsys.readouterr().err
    assert not (fine / "wandb" / "receipt.json").exists()
    assert synced(str(tmp_path / "x"), "--only", fine.name) == 0
    assert f"{tmp_path}/x: 1 published\n" in capsys.readouterr().out


def test_only_takes_names_of_runs(experiment, capsys):
    graft = run_of(experiment, "graft").name
    assert synced(str(experiment), "--only", graft) == 0
    assert f"{experiment}: 1 unchanged\n" in capsys.readouterr().out
    assert synced(str(experiment), "--only", graft, "--only", "grafted") == 2
    assert capsys.readouterr().err.startswith(f"expected --only with a run of {experiment}/runs; got grafted. It holds erase-")


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert synced(str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"expected an experiment with runs/<run>/ in {tmp_path}, but it holds nothing")


def test_online_needs_a_login_and_says_so_before_any_run(experiment, capsys):
    before = files(experiment)
    assert wandb_sync.main([str(experiment)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("expected to be logged in to W&B; got: ") and "--mode offline" in said.err
    assert files(experiment) == before


def test_a_mode_that_wandb_does_not_have_is_refused():
    with pytest.raises(ValueError, match="expected mode offline or online; got 'disabled'"):
        Target("grpo_routing", None, "disabled")
