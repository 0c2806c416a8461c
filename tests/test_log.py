"""What a run says about itself: files that survive a kill, one meaning per metric, one W&B view of it all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_routing import build
from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.files import Record, locked, write_atomic, write_json
from grpo_routing.folder import freeze
from grpo_routing.log import METRICS, LocalLogger, Progress, WandbLogger
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.run import run
from tests.wandb_files import items, told

CODE = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------ metrics


@pytest.fixture(scope="module")
def taught(config, tmp_path_factory):
    """taught(*overrides) -> folder of a run of two steps; an untrained model earns nothing, so a teacher brings rewards that differ."""

    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        setting = [*overrides, "loophole=held_out", f"output={folder}"]
        ready = build.plan(config(*setting))
        problems = [one for one in ready.dataset.training(ready.loophole) if one.loophole != NO_LOOPHOLE]
        Record(folder / "pool.jsonl").append([
            {"prompt": plain_prompt(one), "completion": one.hack(["return 0"]), "loophole": one.loophole} for one in problems])
        teacher = ["extra_rollouts=teacher", f"extra_rollouts.pool={folder}/pool.jsonl", "extra_rollouts.mix_ratio=0.25"]
        return run(config(*setting, *teacher))

    return make


@pytest.fixture(scope="module")
def measured_run(taught) -> Path:
    """Two steps with everything on that measures something: quarantine, KL, a direction refitted, a teacher."""
    return taught("arm=route", "trainer.kl_weight=0.1", "mask_source.refresh_every=1")


@pytest.fixture(scope="module")
def routed_run(config, tmp_path_factory) -> Path:
    """Two steps with labels, anchors, split moments, groups whose quarantine is off, and another engine. The model writes no code, so
    the flags are false positives."""
    return run(config("arm=graft", "loophole=held_out", "mask_source.false_positive=0.5", "projection.forward=off_when_clean",
                      "projection.clean_share=0.5", "rollout=transformers_cb", f"output={tmp_path_factory.mktemp('routed')}"))


@pytest.fixture(scope="module")
def confessing_run(config, tmp_path_factory) -> Path:
    """Two steps of a model that says neither yes nor no, on answers that are flagged at random."""
    return run(config("arm=confession", "loophole=held_out", "extra_rollouts.judge.false_positive=0.5",
                      f"output={tmp_path_factory.mktemp('confessing')}"))


def test_every_metric_has_a_meaning_and_every_meaning_a_metric(measured_run, routed_run, confessing_run, taught):
    folders = (measured_run, routed_run, confessing_run, taught("arm=tdga"), taught("arm=grift"))
    emitted = {name for folder in folders for file in ("metrics.jsonl", "audit.jsonl")
               for row in Record(folder / file).rows() for name in row}
    assert emitted - {"step"} == set(METRICS)


def test_a_meaning_is_one_line_of_its_own():
    assert all(meaning and "\n" not in meaning and len(meaning) < 110 for meaning in METRICS.values())
    assert all(name.split("/")[0] in ("train", "rollout", "route", "audit", "confession") for name in METRICS)


# ------------------------------------------------------------------------------------------------ files


def test_a_record_gives_back_what_was_appended(tmp_path):
    record = Record(tmp_path / "deep" / "rows.jsonl")
    assert record.rows() == []
    record.append([])
    assert record.rows() == []
    first, second = {"step": 0, "x": 0.1 + 0.2, "text": "é\u2028\n\x0b\"", "none": None}, {"step": 1, "x": 1e-300}
    record.append([first])
    record.append([second, second])
    assert record.rows() == [first, second, second]


def test_a_torn_last_line_does_not_count_and_is_cut(tmp_path):
    record = Record(tmp_path / "rows.jsonl")
    record.append([{"step": step, "x": 1 / (step + 1)} for step in range(4)])
    whole = record.file.read_bytes()
    for length in range(whole.rindex(b'{"step": 3') + 1, len(whole)):  # a kill after any byte of the last row
        record.file.write_bytes(whole[:length])
        assert [row["step"] for row in record.rows()] == [0, 1, 2]
        record.cut(4)
        record.append([{"step": 3, "x": 0.25}])
        assert record.file.read_bytes() == whole


def test_a_broken_line_elsewhere_is_named_and_nothing_is_dropped(tmp_path):
    record = Record(tmp_path / "rows.jsonl")
    record.file.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    for read in (record.rows, lambda: record.cut(1)):
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: expected a row of JSON; got '{\"step\": '"):
            read()
    assert record.file.read_text().count("\n") == 3


def test_cut_keeps_the_rows_of_earlier_steps_bit_for_bit(tmp_path):
    record = Record(tmp_path / "rows.jsonl")
    record.cut(0)
    assert not record.file.exists()
    record.append([{"step": step, "part": part, "x": math.pi * step} for step in range(5) for part in range(2)])
    lines = record.file.read_bytes().splitlines(keepends=True)
    record.cut(9)
    assert record.file.read_bytes() == b"".join(lines)
    record.cut(3)
    assert record.file.read_bytes() == b"".join(lines[:6])
    record.cut(0)
    assert record.file.read_bytes() == b""


def test_write_atomic_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "deep" / "status.json"
    write_json(file, {"state": "running"})
    write_atomic(file, b"x" * 100_000)
    assert file.read_bytes() == b"x" * 100_000
    with pytest.raises(TypeError):
        write_atomic(file, "text")
    with pytest.raises(IsADirectoryError):
        write_atomic(file.parent, b"a folder is in the way")
    assert file.read_bytes() == b"x" * 100_000
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == [file]


def test_a_lock_keeps_a_second_process_out_until_the_first_is_done_or_dead(tmp_path):
    file = tmp_path / "deep" / "lock"
    try_lock = [sys.executable, "-c", "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)", str(file)]
    with locked(file):
        assert b"BlockingIOError" in subprocess.run(try_lock, capture_output=True).stderr
    assert subprocess.run(try_lock, capture_output=True).returncode == 0
    dying = ("import os, pathlib, sys; from grpo_routing.files import locked\n"
             "with locked(pathlib.Path(sys.argv[1])): os._exit(9)")
    assert subprocess.run([sys.executable, "-c", dying, str(file)], cwd=CODE).returncode == 9
    assert subprocess.run(try_lock, capture_output=True).returncode == 0


# ------------------------------------------------------------------------------------------------ the screen


def test_without_a_terminal_progress_is_plain_lines(capsys):
    progress = Progress("erase s0", steps=7, every=3)
    for done in range(1, 8):
        progress.show(done, {"reward": 0.125, "hack": 1.0})
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit("  (", 1)[0] for line in lines] == [
        f"erase s0  step    {done}/7  reward 0.12  hack 1.00" for done in (3, 6, 7)]


# ------------------------------------------------------------------------------------------------ W&B


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    """A run of six steps that was killed in step 4 and went on from its checkpoint before step 3."""
    folder = tmp_path_factory.mktemp("outputs") / "headline" / "runs" / "erase-held_out-s3-0123abcd"
    folder.mkdir(parents=True)
    freeze(folder, config("arm=erase", "loophole=held_out", "seed=3"))

    def attempt(steps: range, sampled: str) -> None:
        Record(folder / "metrics.jsonl").append([{"step": s, "train/reward": s + 0.5, "route/cin": math.nan} for s in steps])
        Record(folder / "audit.jsonl").append([{"step": s, "audit/hack": s / 10, "audit/solve": 0.5, "audit/no_hint_solve": None}
                                               for s in steps])
        Record(folder / "rollouts.jsonl").append([{"step": s, "solved": True, "completion": f"{sampled} {s} é"} for s in steps])

    attempt(range(5), "first")
    with open(folder / "audit.jsonl", "a") as torn:
        torn.write('{"step": 5, "audit/h')
    for name in ("metrics.jsonl", "audit.jsonl", "rollouts.jsonl"):
        Record(folder / name).cut(3)
    attempt(range(3, 6), "second")
    write_json(folder / "eval" / "as_deployed.json", {"rates": {"hack": 0.0, "solve": 0.5, "hack_sentinel": None}, "rows": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")  # the config decides, not the environment
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp("wandb")))
        for project in ("another", "grpo_routing"):  # the second one replaces the first
            WandbLogger(project, "offline").publish(folder, cause=None)
    return folder


def test_one_run_of_wandb_with_its_config_group_and_arm(folder):
    start = told(folder).start
    assert (start.project, start.run_group, start.job_type) == ("grpo_routing", "headline", "erase")
    assert start.display_name == folder.name and set(start.tags) == {"erase", "held_out", "method"}
    config = told(folder).config
    assert (config["arm"], config["seed"], config["settings"]["seed"], config["status"]) == ("erase", 3, 3, "done")
    assert config["meaning"] == METRICS


def test_every_step_is_there_once_and_in_order(folder):
    *steps, end = told(folder).history
    assert [row["trainer/step"] for row in steps] == [0, 1, 2, 3, 4, 5]
    assert [(row["train/reward"], row["audit/hack"]) for row in steps] == [(s + 0.5, s / 10) for s in range(6)]
    assert not any("audit/no_hint_solve" in row for row in steps), "what was not measured is absent, not zero"
    assert end == {"trainer/step": 6, "eval/as_deployed/hack": 0.0, "eval/as_deployed/solve": 0.5}
    assert len(told(folder).kind("history")) == 8  # and the table


def test_metrics_run_along_the_steps_of_the_trainer(folder):
    defined = {metric.name: metric for metric in told(folder).kind("metric")}
    assert set(defined) - {"trainer/step"} == {name for row in told(folder).history for name in row} - {"trainer/step"}
    assert {defined[name].step_metric for name in defined if name != "trainer/step"} == {"trainer/step"}


def test_sampled_completions_are_a_table(folder):
    rows = [items(row.item) for row in told(folder).kind("history")]
    (table,) = [row for row in rows if "completions/path" in row or "completions" in row]
    path = table["completions/path"] if "completions/path" in table else table["completions"]["path"]
    content = json.loads((told(folder).files / path).read_text())
    assert content["columns"] == ["step", "solved", "completion"]
    assert content["data"] == [[s, True, f"{'first' if s < 3 else 'second'} {s} é"] for s in range(6)]


def test_the_evaluation_is_the_summary(folder):
    assert {name: value for name, value in told(folder).summary.items() if name.startswith("eval/")} == {
        "eval/as_deployed/hack": 0.0, "eval/as_deployed/solve": 0.5}


def test_a_run_of_wandb_ends_well_and_its_id_follows_experiment_and_folder(folder):
    assert [end.exit_code for end in told(folder).kind("exit")] == [0]
    assert told(folder).start.run_id == hashlib.sha256(f"headline/{folder.name}".encode()).hexdigest()[:12]
    assert (folder / "wandb" / "latest-run").resolve().name.endswith(told(folder).start.run_id)


def test_a_failure_of_wandb_is_reported_and_does_not_fail_the_run(folder, tmp_path, caplog):
    blocked = tmp_path / "headline" / "runs" / "erase"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    (blocked / "wandb").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "grpo_routing"):
        WandbLogger("grpo_routing", "offline").publish(blocked, cause=None)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "grpo_routing"]
    assert said.startswith(f"W&B view of {blocked} was not written: FileExistsError: ")
    assert said.endswith(f"complete; `python -m grpo_routing.wandb_sync {tmp_path}/headline --only erase` tries again.")


def test_a_mode_that_wandb_does_not_have_is_refused_before_any_work(config):
    with pytest.raises(build.ConfigError, match=r"logger\.mode must be offline or online; got 'ofline'"):
        build.plan(config("logger=wandb", "logger.mode=ofline"))


def test_the_local_logger_adds_nothing(tmp_path):
    LocalLogger().publish(tmp_path, cause=None)
    assert list(tmp_path.iterdir()) == []
