"""Claims about sweeps that need no cluster: planning, files, the pool of this machine. tests/slurm/ has those on a real SLURM."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from rich.console import Console

from grpo_routing.files import Held, claimed
from grpo_routing.folder import Frozen
from launchers import runner, slurm, table
from launchers.plan import Entry, SweepPlan, extend, gaps, read_plan
from launchers.settings import LaunchError, resources_of, settings_of
from launchers.status import RunStatus, statuses
from launchers.submissions import cancelled, ended_by, launches, note
from tests.conftest import CONF, SMOKE

ROOT = CONF.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def settings(backend: str, **changes) -> dict:
    said = yaml.safe_load((CONF / "hydra" / "launcher" / f"{backend}.yaml").read_text())
    return {key: value for key, value in said.items() if key not in ("defaults", "_target_")} | changes


def a_plan(root: Path, *entries: Entry) -> SweepPlan:
    code = {"folder": str(ROOT), "python": sys.executable, "cwd": str(ROOT)}
    return SweepPlan(root, code, [], settings_of(settings("local")), list(entries))


def an_entry(seed: int, arm: str = "vanilla") -> Entry:
    return Entry(f"{arm}-all-s{seed}-0", arm, "all", seed, 2, {"minutes": 60, "gpus": 0})


def python(*words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, **more)


# ------------------------------------------------------------------------------------------------ walls


def test_the_launchers_know_no_torch():
    code = ("import sys, launchers.__main__, launchers.runner, launchers.local, launchers.collect, grpo_routing.report; "
            "print([name for name in ('torch', 'transformers', 'submitit') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ settings and plans


def test_settings_name_every_fault():
    with pytest.raises(LaunchError, match=r"launcher.resources.minutes: .*got 'soon'"):
        settings_of(settings("local", resources={"minutes": "soon", "gpus": 0}))
    faults = "launcher.gaps must be refuse or allow; got 'maybe'\nlauncher.parallel must be at least 1; got 0"
    with pytest.raises(LaunchError, match=faults):
        settings_of(settings("slurm", gaps="maybe", parallel=0))
    with pytest.raises(LaunchError, match="resources of qwen3: cores is none of minutes, cpus"):
        settings_of(settings("slurm", by_model={"qwen3": {"cores": 4}}))
    with pytest.raises(LaunchError, match="launcher.colour: extra inputs are not permitted|launcher.colour: unexpected"):
        settings_of(settings("slurm", colour="red"))
    with pytest.raises(LaunchError, match="launcher.resources.gpus is 2 and launcher.gpus lists 1; name the devices"):
        settings_of(settings("local", gpus=[0], resources={"minutes": 1, "gpus": 2}))


def test_resources_differ_per_model_and_arm_and_the_arm_wins():
    made = settings_of(settings("slurm", by_model={"big": {"gpus": 4, "minutes": 900}}, by_arm={"teacher": {"minutes": 1200}}))
    assert (resources_of(made, "small", "erase").gpus, resources_of(made, "big", "erase").minutes) == (1, 900)
    assert (resources_of(made, "big", "teacher").gpus, resources_of(made, "big", "teacher").minutes) == (4, 1200)


def test_a_plan_grows_and_never_changes_or_drops_a_run(tmp_path):
    first = a_plan(tmp_path, an_entry(0))
    assert extend(first)[1] == 1 and extend(first)[1] == 0
    before = (tmp_path / "plan.json").read_text()
    extend(first)
    assert (tmp_path / "plan.json").read_text() == before
    whole, new = extend(a_plan(tmp_path, an_entry(1)))
    assert new == 1 and [one.seed for one in whole.entries] == [0, 1] and read_plan(tmp_path).entries == whole.entries


def test_an_unplanned_folder_and_another_version_are_refused(tmp_path):
    with pytest.raises(LaunchError, match="it has no plan.json. Plan one: python -m launchers plan"):
        read_plan(tmp_path)
    extend(a_plan(tmp_path, an_entry(0)))
    (tmp_path / "plan.json").write_text(json.dumps(json.loads((tmp_path / "plan.json").read_text()) | {"version": 9}))
    with pytest.raises(LaunchError, match="has version 9; this code reads version 1"):
        read_plan(tmp_path)


def test_gaps_name_what_is_missing():
    assert gaps([an_entry(0), an_entry(1), an_entry(0, "erase")]) == [
        "gap: erase on all has no seed 1, which another arm has; add it, or set hydra.launcher.gaps=allow"]
    assert gaps([an_entry(0), an_entry(0, "erase")]) == []


def test_every_fault_of_a_sweep_comes_in_one_list_and_nothing_is_written(tmp_path):
    """A config that cannot be run, a missing control, a duplicate."""
    done = python("grpo_routing", "-m", *SMOKE, "hydra/launcher=local", "arm=filter,filter", "trainer.group=4,1",
                  "hydra.sweeper.controls=refuse", f"output={tmp_path}", f"hydra.sweep.dir={tmp_path}/hydra")
    assert done.returncode == 1
    for words in ("trainer.group must be at least 2; got 1", "the sweep lacks 1 controls", "is planned 2 times"):
        assert words in done.stderr, done.stderr
    assert not list(tmp_path.glob("*/runs")) and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ composing


def test_a_thousand_configs_are_composed_as_hydra_does_one():
    from hydra_plugins.sweep_configs import compose_all

    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    words = (["seed=0"], ["loophole=held_out"], ["loophole.known=[sentinel]"], ["seed=7", "trainer.steps=9"])
    jobs = [[*SMOKE, choice, *more] for more in words
            for choice in ("arm=vanilla", "mask_source=detector", "arm=graft", "mask_source=none")]  # two are named after their options
    found, problems = compose_all(loader, master, jobs)
    assert problems == []
    for job, one in zip(jobs, found):
        whole = loader.load_sweep_config(master, job)
        with open_dict(whole):
            del whole["hydra"]
        assert OmegaConf.to_container(whole, resolve=True) == one.config
        assert OmegaConf.to_container(OmegaConf.create(yaml.dump(one.config, Dumper=Frozen, sort_keys=False))) == one.config
        assert one.choices["model"] == "tiny_random"
    _, problems = compose_all(loader, master, [["seed=1", "trainer.stepz=3"], ["arm=nobody"], ["output=???"]])
    assert len(problems) == 3 and "stepz" in problems[0] and "nobody" in problems[1] and "output" in problems[2]


@pytest.mark.parametrize("text", ["1e5", "0.1", "nan", "yes", "null", "a: b", "1_000", "Dr. GRPO", "–"])
def test_a_frozen_word_stays_a_word(text):
    frozen = yaml.dump({"key": text}, Dumper=Frozen, allow_unicode=True)
    assert OmegaConf.to_container(OmegaConf.create(frozen)) == yaml.safe_load(frozen) == {"key": text}


# ------------------------------------------------------------------------------------------------ locks and records


def test_a_run_is_held_by_one_process_and_free_when_that_is_dead(tmp_path):
    file = tmp_path / ".lock"
    code = (f"import time; from pathlib import Path; from grpo_routing.files import claimed\n"
            f"with claimed(Path({str(file)!r}), 0): print('has it', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "has it\n"
    said = f"is being worked on by process {holder.pid} on .*; the same run never runs twice at once"
    with pytest.raises(Held, match=said), claimed(file, 0):
        pass
    holder.kill()
    holder.communicate()
    with claimed(file, 1.0):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert file.read_text() == ""


def test_an_owner_whose_job_still_runs_elsewhere_keeps_the_lock(tmp_path, monkeypatch):
    """Where the file system does not pass locks on, what the file says counts; squeue knows whether it is still true."""
    (tmp_path / "squeue").write_text("#!/bin/sh\ncase \"$*\" in *'-j 77 '*) echo 77;; *) exit 1;; esac\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for job, held in (("77", True), ("78", False), (None, False)):
        (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": job, "since": 0}))
        if held:
            with pytest.raises(Held, match=r"process 1 on elsewhere \(SLURM job 77\)"), claimed(tmp_path / ".lock", 0):
                pass
            monkeypatch.setenv("SLURM_JOB_ID", "77")  # its own former life
        with claimed(tmp_path / ".lock", 0):
            pass
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_half_a_row_is_taken_away_and_causes_are_counted_until_forgiven(tmp_path):
    note(tmp_path, "end", cause="crashed")
    with open(tmp_path / "launches.jsonl", "a") as handle:
        handle.write('{"event": "en')
    note(tmp_path, "end", cause="crashed")
    assert ended_by(launches(tmp_path)) == {"crashed": 2}
    note(tmp_path, "forgive")
    assert ended_by(launches(tmp_path)) == {} and not cancelled(launches(tmp_path), 0)


def test_causes_from_slurms_words_and_from_a_workers_last_lines(tmp_path):
    line = "JobId=9 ArrayJobId=7 ArrayTaskId=2 JobName=x JobState=OUT_OF_MEMORY Reason=None"
    assert slurm.job_state(line) == ("7_2", "OUT_OF_MEMORY") and slurm.CAUSES["OUT_OF_MEMORY"] == "out_of_memory"
    ending = "JobState=COMPLETING Reason={} Restarts={}"
    assert [slurm.underneath(ending.format(*facts), 1) for facts in (("None", 1), ("TimeLimit", 1), ("None", 2))] == [
        "CANCELLED", "TIMEOUT", "PREEMPTED"]
    assert slurm.underneath("JobState=RUNNING Reason=None Restarts=0", 0) == "RUNNING"
    assert runner.failure(tmp_path, 1, ["MemoryError"])[0] == "out_of_memory"
    (tmp_path / "status.json").unlink()
    cause, detail = runner.failure(tmp_path, 139, ["boom"])
    assert (cause, detail) == ("crashed", "the worker was ended by SIGSEGV")
    assert json.loads((tmp_path / "status.json").read_text())["last_lines"] == ["boom"]


def test_why_a_run_was_stopped_is_read_off_the_wall_time_and_the_job(tmp_path, monkeypatch):
    plan = replace(a_plan(tmp_path), settings=settings_of(settings("slurm")))
    for left, state, cause in ((30, "RUNNING", "timed_out"), (7200, "RUNNING", "preempted"), (30, "PREEMPTED", "preempted"),
                               (7200, "TIMEOUT", "timed_out"), (7200, "CANCELLED", "cancelled")):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + left))
        assert runner.why_stopped(plan, "1", state) == cause


# ------------------------------------------------------------------------------------------------ this machine


def test_a_local_sweep_from_plan_to_report_with_a_signal_on_the_way(tmp_path, cache):
    """plan, submit, stop one run, status, collect; its GPU is pinned."""
    root = tmp_path / "here"
    planned = python("launchers", "plan", root, "backend=local", *SMOKE, "arm=vanilla", "seed=0,1", "trainer.steps=4", f"cache={cache}",
                     "dataset.train_problems=100", "hydra.launcher.parallel=2", "hydra.launcher.gpus=[4,7]",
                     "hydra.launcher.resources.gpus=1",
                     "hydra.launcher.poll_seconds=1", f"hydra.sweep.dir={tmp_path}/hydra")
    assert planned.returncode == 0 and "planned 2 runs" in planned.stdout and "(2.0 GPU hours)" in planned.stdout, planned.stderr
    assert "2 planned" in python("launchers", "status", root).stdout
    said = python("launchers", "submit", root)
    assert "submitted 2 runs" in said.stdout, said.stderr
    (first,) = (root / "runs").glob("vanilla-all-s0-*")
    deadline = time.monotonic() + 120
    while not (first / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    start = next(row for row in launches(first) if row["event"] == "start")
    pinned = Path(f"/proc/{start['pid']}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=4" in pinned and b"LAUNCHERS_PROCESSES=1" in pinned
    os.kill(start["pid"], signal.SIGUSR1)
    assert "nothing to submit" in python("launchers", "submit", root).stdout
    shown = python("launchers", "watch", root, timeout=300)
    assert shown.returncode == 0 and "2 done" in shown.stdout, shown.stdout
    while launches(first)[-1]["event"] != "end" and time.monotonic() < deadline + 300:  # written a moment after the run's own state
        time.sleep(0.05)
    ends = [row["cause"] for row in launches(first) if row["event"] == "end"]
    assert ends in (["preempted", "finished"], ["finished"])  # the signal may come in the last step
    assert "2 of 2 runs finished" in python("launchers", "collect", root).stdout and (root / "results.parquet").exists()
    assert all(one.state == "done" for one in statuses(read_plan(root))[0])


def test_a_short_screen_shows_what_happens_and_says_how_much_it_leaves_out(tmp_path):
    entries = [replace(an_entry(at), folder=f"run{at:02d}") for at in range(30)]
    whole = a_plan(tmp_path, *entries)
    found = [RunStatus(one, "failed" if at == 25 else "running" if at == 20 else "done", "", "", "", 2, 0.5, None, None, 1, {})
             for at, one in enumerate(entries)]

    def shown(lines: int) -> list[str]:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(table.screen(whole, found, "", lines))
        return console.export_text().splitlines()

    short = shown(10)
    assert short[0].endswith(": 28 done, 1 running, 1 failed") and len(short) <= 10
    assert [line.split()[0] for line in short[2:5]] == ["run20", "run25", "run00"]
    assert short[-1] == "and 24 more; python -m launchers status lists them all"
    assert len(shown(40)) == 2 + 30
