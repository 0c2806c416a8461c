"""Claims about sweeps on SLURM, on a real one: nothing is lost, nothing runs twice, nothing is changed by later edits.

Memory is not limited in a cluster of one machine without control groups, so the case of a run without memory takes its address space away
(prlimit): its allocations really fail, and the cause is read off its error. What SLURM calls OUT_OF_MEMORY is in tests/test_launchers.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.slurm.conftest import TINY, Cluster, at_step, causes, folder, rows, starts, until

pytestmark = pytest.mark.slurm
STEPS = 200
LONG = [f"trainer.steps={STEPS}", "trainer.checkpoint_every=2", "arm=erase", "health=off"]  # an untrained model earns nothing: it is dead


def weights(run: Path, steps: int = STEPS) -> dict:
    return load_file(run / "checkpoints" / f"step-{steps:06d}" / "state.safetensors")


def same(one: Path, other: Path, steps: int = STEPS) -> bool:
    """Final weights, optimizer and records, bit for bit."""
    first, second = weights(one, steps), weights(other, steps)
    return (first.keys() == second.keys() and all((value == second[key]).all() for key, value in first.items())
            and (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text())


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """whole(seed, steps) -> folder of the same run, never interrupted, without any launcher."""
    made = {}

    def run(seed: int, *more: str) -> Path:
        if (seed, more) not in made:
            output = tmp_path_factory.mktemp("whole")
            cluster.python("grpo_routing", *TINY, *LONG, *more, f"seed={seed}", f"output={output}", f"cache={cluster.cache}")
            (made[seed, more],) = output.glob("*/runs/*")
        return made[seed, more]

    return run


# ------------------------------------------------------------------------------------------------ a sweep from plan to report


@pytest.fixture(scope="module")
def smoke(cluster: Cluster, tmp_path_factory):
    """experiment=smoke: submitted by a process that is killed, edited while it waits, submitted again, finished, collected."""
    root = tmp_path_factory.mktemp("out") / "smoke"
    words = cluster.words(root, "experiment=smoke", "hydra.launcher.wait=true")
    launcher = subprocess.Popen([sys.executable, "-m", *words], cwd=cluster.code, env=cluster.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = ""
    while "waiting" not in said:
        line = launcher.stdout.readline()
        assert line, said
        said += line
    launcher.kill()
    launcher.communicate()
    trainer = cluster.code / "conf" / "trainer" / "smoke.yaml"
    before = trainer.read_text()
    try:
        trainer.write_text(before.replace("steps: 2", "steps: 5"))
    finally:
        shown = cluster.launchers("submit", root).stdout
        watched = cluster.finish(root)
        trainer.write_text(before)
    report = cluster.launchers("collect", root).stdout
    return root, {"launched": said, "again": shown, "watched": watched, "report": report}


def test_an_array_of_six_runs_two_at_a_time(smoke):
    root, said = smoke
    assert "planned 6 runs" in said["launched"] and "at most 1.0 hours requested" in said["launched"]
    (submission,) = (root / "submissions").glob("*.json")
    made = json.loads(submission.read_text())
    assert len(made["runs"]) == 6 and "#SBATCH --array=0-5%2" in (root / "slurm" / f"{made['job']}_submission.sh").read_text()
    events = sorted((row["time"], 1 if row["event"] == "start" else -1) for run in (root / "runs").iterdir()
                    for row in rows(run / "launches.jsonl"))
    together, most = 0, 0
    for _, change in events:
        together += change
        most = max(most, together)
    assert most == 2 and len(events) == 12


def test_a_killed_launcher_loses_nothing(smoke):
    root, said = smoke
    assert all(json.loads((run / "status.json").read_text())["state"] == "done" for run in (root / "runs").iterdir())
    assert "smoke: 6 done" in said["watched"]


def test_an_edit_after_submission_changes_nothing(smoke):
    root, _ = smoke
    assert {len(rows(run / "metrics.jsonl")) for run in (root / "runs").iterdir()} == {2}


def test_submitting_twice_starts_nothing_twice(smoke):
    root, said = smoke
    assert said["again"].splitlines()[-1] == "nothing to submit"
    assert all(len(starts(run)) == 1 for run in (root / "runs").iterdir())


def test_collect_writes_the_report_and_a_table(smoke):
    root, said = smoke
    from pyarrow import parquet

    table = parquet.read_table(root / "results.parquet")
    assert table.num_rows == 18 and set(table["launch_state"].to_pylist()) == {"done"}
    assert "smoke: 6 of 6 runs finished" in said["report"] and (root / "report.md").exists()


def test_an_array_above_the_limit_goes_in_parts(cluster, tmp_path):
    root = tmp_path / "wide"
    cluster.sweep(root, "arm=vanilla", "seed=range(9)", "+hydra.launcher.sbatch.begin='now+1hour'")
    made = [json.loads(file.read_text()) for file in (root / "submissions").glob("*.json")]
    assert sorted(len(one["runs"]) for one in made) == [2, 7]
    queued = cluster.run("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i").stdout.split()
    assert {f"{one['job']}_{index}" for one in made for index in range(len(one["runs"]))} <= set(queued)
    half = cluster.launchers("status", root, check=False)
    assert half.returncode == 1 and "9 queued" in half.stdout
    assert "0 of 9 runs finished" in cluster.launchers("collect", root).stdout  # also of a sweep that has hardly begun
    assert "9 runs cancelled" in cluster.launchers("cancel", root).stdout
    assert "9 cancelled" in cluster.launchers("status", root, check=False).stdout
    assert not set(cluster.run("squeue", "-h", "-r", "-o", "%i").stdout.split()) & set(queued)


def test_a_submission_that_was_cut_short_is_cleared_up(cluster, tmp_path):
    """Killed between sbatch and the record of the job's number: the jobs are held, and the next submit finds them by name."""
    root = tmp_path / "cut"
    cluster.sweep(root, "arm=vanilla", "hydra.launcher.submit=false")
    assert "1 planned" in cluster.launchers("status", root, check=False).stdout
    lost = {"name": "cut-short", "created": 1.0, "backend": "slurm", "job": None, "released": False, "resources": {},
            "runs": [folder(root, "vanilla").name]}
    (root / "submissions").mkdir()
    (root / "submissions" / "cut-short.json").write_text(json.dumps(lost))
    job = cluster.run("sbatch", "--parsable", "--hold", "-J", "cut-short", "-o", "/dev/null", "--wrap", "true").stdout.strip()
    said = cluster.launchers("submit", root, "minutes=3").stdout
    assert "dropped cut-short, whose submission had been cut short (1 held jobs cancelled)" in said and "submitted 1 runs" in said
    assert cluster.state(job) == "CANCELLED"
    assert "1 done" in cluster.finish(root)
    (submission,) = (root / "submissions").glob("*.json")
    assert json.loads(submission.read_text())["resources"]["minutes"] == 3


# ------------------------------------------------------------------------------------------------ runs that end badly


def test_a_run_that_raises_fails_for_slurm_and_hides_nobody(cluster, tmp_path):
    root = tmp_path / "raises"
    cluster.sweep(root, "arm=vanilla", "seed=0,1", "hydra.launcher.submit=false")
    bad = folder(root, "vanilla-held_out-s0")
    (bad / "checkpoints").mkdir()
    (bad / "checkpoints" / "latest").write_text("step-000099")  # a checkpoint that is gone
    cluster.launchers("submit", root)
    shown = cluster.finish(root)
    assert "1 done, 1 failed" in shown and "FileNotFoundError" in shown
    job = starts(bad)[0]["job"]
    assert cluster.state(job) == "FAILED"
    said = json.loads((bad / "status.json").read_text())
    assert said["state"] == "failed" and "Traceback" in said["traceback"] and "step-000099" in said["last_lines"][-1]
    assert "FileNotFoundError" in (bad / "attempts" / "001.log").read_text()
    assert "1 failed or lost runs are left alone" in cluster.launchers("submit", root).stdout
    cluster.launchers("retry", root)  # launcher.retries.crashed is 1
    cluster.finish(root)
    assert causes(bad) == ["crashed", "crashed"]
    assert "crashed 2 times and launcher.retries.crashed is 1; left alone" in cluster.launchers("retry", root).stdout
    shutil.rmtree(bad / "checkpoints")
    cluster.launchers("retry", root, "--anyway")
    assert "2 done" in cluster.finish(root)


def test_a_run_without_memory_says_so(cluster, tmp_path):
    root = tmp_path / "memory"
    cluster.sweep(root, *LONG, "hydra.launcher.retries.out_of_memory=0")
    run = folder(root, "erase")
    at_step(run, 2)
    runner = starts(run)[0]["pid"]
    worker = Path(f"/proc/{runner}/task/{runner}/children").read_text().split()[0]
    cluster.run("prlimit", "--pid", worker, "--as=1")  # from now on the kernel gives it no more
    shown = cluster.finish(root)
    assert causes(run) == ["out_of_memory"] and "1 failed" in shown and "out of memory" in shown
    assert cluster.state(starts(run)[0]["job"]) == "FAILED"
    assert json.loads((run / "status.json").read_text())["last_lines"]
    assert "launcher.retries.out_of_memory is 0; left alone" in cluster.launchers("retry", root).stdout


@contextmanager
def mounted(*words: object):
    """Mount what the last word names; a CI machine gives root."""
    subprocess.run(["mount", *map(str, words)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(words[-1])], check=True)


def test_a_full_disk_stops_with_a_clear_error_and_loses_nothing(cluster, tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    root = disk / "full"
    with mounted("-t", "tmpfs", "-o", "size=24M", "tmpfs", disk):
        cluster.sweep(root, *LONG, "seed=0")
        run = folder(root, "erase")
        at_step(run, 3)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/ballast", "bs=4k"], capture_output=True)  # until it is full
        until(lambda: "running" not in cluster.launchers("status", root, check=False).stdout.splitlines()[0], "the end of the run")
        shown = cluster.launchers("status", root, check=False)
        assert "1 failed" in shown.stdout or "1 lost" in shown.stdout
        (disk / "ballast").unlink()
        log = next((root / "slurm").glob("*_log.out")).read_text()
        assert "No space left on device" in shown.stdout + log
        cluster.launchers("retry", root)
        assert "1 done" in cluster.finish(root)
        assert same(run, whole(0))


def test_a_read_only_folder_is_named_and_the_run_goes_on_later(cluster, tmp_path):
    root = tmp_path / "readonly"
    cluster.sweep(root, "arm=vanilla", "hydra.launcher.submit=false")
    run = folder(root, "vanilla")
    with mounted("--bind", run, run):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run)], check=True)
        cluster.launchers("submit", root)
        shown = cluster.finish(root)
    assert "1 lost" in shown and "SLURM says FAILED" in shown
    assert "Read-only file system" in next((root / "slurm").glob("*_log.out")).read_text()
    cluster.launchers("retry", root)
    assert "1 done" in cluster.finish(root)


# ------------------------------------------------------------------------------------------------ runs that are interrupted


def test_signals_of_each_kind_and_a_kill_resume_to_the_same_weights(cluster, tmp_path, whole):
    root = tmp_path / "signals"
    cluster.sweep(root, *LONG, "seed=0,1,2,3", "hydra.launcher.parallel=1")  # one after another, so that each can be met in mid-run
    runs = [folder(root, f"erase-held_out-s{seed}") for seed in range(4)]
    for run, name in zip(runs, ("TERM", "USR1", "USR2")):
        at_step(run, 2)
        cluster.signal(name, starts(run)[0]["job"], run)
    at_step(runs[3], 3)
    os.kill(starts(runs[3])[0]["pid"], signal.SIGKILL)  # no notice
    shown = cluster.finish(root)
    assert "3 done, 1 lost" in shown
    for run, name in zip(runs, ("TERM", "USR1", "USR2")):
        first, *_ = [row for row in rows(run / "launches.jsonl") if row["event"] == "end"]
        assert first["cause"] == "preempted" and f"SIG{name}" in first["detail"] and first["exit"] == 143
        assert len(starts(run)) == 2 and starts(run)[1]["restart"] == "1" and len(list((run / "attempts").glob("*.json"))) == 2
    cluster.launchers("retry", root)
    assert "4 done" in cluster.finish(root)
    assert causes(runs[3]) == ["crashed", "finished"]
    assert all(same(run, whole(seed)) for seed, run in enumerate(runs))


def test_scancel_is_obeyed_and_submit_takes_the_run_up_again(cluster, tmp_path, whole):
    root = tmp_path / "scancel"
    cluster.sweep(root, *LONG, "seed=0")
    run = folder(root, "erase")
    at_step(run, 2)
    cluster.run("scancel", starts(run)[0]["job"])
    assert "1 cancelled" in cluster.finish(root)
    assert causes(run) in ([], ["cancelled"]) and len(starts(run)) == 1  # none when SLURM's patience was shorter than a step
    cluster.launchers("submit", root)
    assert "1 done" in cluster.finish(root) and same(run, whole(0))


def test_a_preempted_run_gives_way_and_comes_back(cluster, tmp_path, whole):
    root = tmp_path / "preempted"
    cluster.sweep(root, *LONG, "seed=1", "hydra.launcher.resources.partition=debug")
    run = folder(root, "erase")
    at_step(run, 2)
    cluster.run("sbatch", "-p", "high", "-c", "2", "-t", "2", "-o", "/dev/null", "--wrap", "sleep 5")
    assert "1 done" in cluster.finish(root)
    assert causes(run) == ["preempted", "finished"] and starts(run)[1]["restart"] == "1"
    assert same(run, whole(1))


def test_a_time_limit_is_met_at_a_step_and_the_run_goes_on(cluster, tmp_path, whole):
    """SLURM looks at the clock every 30 s, so a limit of one minute warns after half of it or all: a run must take longer."""
    root, more = tmp_path / "limit", ("trainer.steps=1500", "trainer.checkpoint_every=20")
    cluster.sweep(root, *LONG, *more, "seed=2", "hydra.launcher.resources.minutes=1")
    assert "1 done" in cluster.finish(root)
    run = folder(root, "erase")
    assert set(causes(run)) == {"timed_out", "finished"} and len(starts(run)) >= 2
    assert same(run, whole(2, *more), 1500)


def test_the_same_run_never_runs_twice_at_once(cluster, tmp_path):
    root = tmp_path / "twice"
    cluster.sweep(root, *LONG, "seed=0")
    run = folder(root, "erase")
    at_step(run, 1)
    second = cluster.python("grpo_routing.worker", str(run), check=False)
    assert second.returncode in (0, 75)  # it ended meanwhile, or the second gave up waiting
    assert "the same run never runs twice at once" in second.stderr or "done already" in second.stdout, second.stdout
    assert "1 done" in cluster.finish(root)
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(STEPS))


# ------------------------------------------------------------------------------------------------ one run in several processes


def test_two_processes_of_srun_and_of_a_sweeps_job_do_what_one_does(cluster: Cluster, tmp_path):
    """On the CPU, by gloo. A sweep's job is one task, whose runner starts a process per GPU."""
    words = [*TINY, "arm=erase", "trainer.steps=3", f"cache={cluster.cache}"]
    cluster.python("grpo_routing", *words, f"output={tmp_path / 'one'}")
    cluster.run("srun", "--ntasks", "2", "--overcommit", sys.executable, "-m", "grpo_routing", *words, f"output={tmp_path / 'srun'}")
    cluster.sweep(tmp_path / "two", "arm=erase", "trainer.steps=3", "hydra.launcher.resources.gpus=2")
    cluster.finish(tmp_path / "two")
    runs = [next((tmp_path / "one").glob("*/runs/*")), next((tmp_path / "srun").glob("*/runs/*")), folder(tmp_path / "two", "erase")]
    assert [json.loads((run / "attempts" / "001.json").read_text())["processes"] for run in runs] == [1, 2, 2]
    assert all(json.loads((run / "status.json").read_text())["state"] == "done" for run in runs) and causes(runs[2]) == ["finished"]
    first, *others = (rows(run / "metrics.jsonl") for run in runs)
    assert all(other == pytest.approx(one, abs=1e-5, rel=1e-4) for two in others for one, other in zip(first, two, strict=True))
