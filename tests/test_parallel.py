"""Claims about a run in several processes: it is the run in one, to rounding, and no process waits for one that has failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from submitit import SlurmExecutor

from grpo_routing import __main__ as entry
from grpo_routing.extra_rollouts import confession
from grpo_routing.files import Record
from grpo_routing.folder import code_identity, flat
from grpo_routing.parallel import ALONE, Disagreement, Place, World, place_of, started
from launchers import slurm, workers
from launchers.plan import SweepPlan, write_plan
from launchers.settings import settings_of
from launchers.submissions import launches
from launchers.workers import Workers, meeting
from tests import two_processes
from tests.conftest import CONF
from tests.test_launchers import settings

ROOT = CONF.parent
SMALL = ("loophole=held_out", "dataset.train_problems=40")
FLAGS = "mask_source.false_positive=0.5"  # an untrained model does not hack
ARMS = {
    "vanilla": ["arm=vanilla"],
    "erase": ["arm=erase"],
    "route": ["arm=route"],
    "kl, two inner steps": ["arm=vanilla", "trainer.kl_weight=0.1", "trainer.inner_steps=2"],
    "split moments of two streams": ["arm=graft", FLAGS, "advantage=weighted"],
    "masked by activations, seven groups": ["arm=sourced", "mask_source.calibration.pilot=1", "trainer.prompts_per_step=3"],
    "masked by gradients": ["arm=sourced", "mask_source=persona_gradient_rollout", "mask_source.calibration.rule=history"],
    "masked by fingerprints": ["arm=sourced", "mask_source=fingerprint"],
    "confession": ["arm=confession", "extra_rollouts.judge.false_positive=0.5"],
}
RUN = (*SMALL, "arm=graft_lookalike", FLAGS, "mask_source.pilot=2", "advantage=penalty", "trainer.steps=4",
       "trainer.checkpoint_every=3")
CLOSE = 1e-4  # of how far the weights moved; measured: 4e-6


def port() -> int:
    return int(meeting(2)[0]["MASTER_PORT"])


def moved_alike(one: dict, two: dict, start: dict) -> bool:
    """Whether both went the same way from the start, name by name, and somewhere at all."""
    errors = [float((two[name] - one[name]).double().norm()) <= CLOSE * float((one[name] - start[name]).double().norm()) for name in one]
    return one.keys() == two.keys() and all(errors) and any(not torch.equal(one[name], start[name]) for name in one)


def close_rows(ones: list[dict], twos: list[dict]) -> bool:
    return len(ones) == len(twos) and all(
        one.keys() == two.keys() and all(two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5, nan_ok=True) for name in one)
        for one, two in zip(ones, twos))


@pytest.fixture(scope="module")
def stage(config, tmp_path_factory):
    """What one process left behind, and two, in the order in which they work on the same folders."""
    root = tmp_path_factory.mktemp("parallel")

    def of(name: str) -> dict:
        return config(*RUN, "experiment_name=e") | {"output": str(root / name)}

    assert set(two_processes.whole_run(of("one"), 0)) == {"folder"}
    assert two_processes.whole_run(of("one_then_two"), 1, 1, "SIGTERM")["error"] == "Stopped"
    jobs = [{"kind": "steps", "name": name, "config": config(*SMALL, *words)} for name, words in ARMS.items()]
    jobs += [{"kind": "words", "name": "words", "config": of("words")}]
    jobs += [{"kind": "run", "name": name, "config": of(name), "more": [1, name]}
             for name in ("SIGUSR2", "error", "not finite", "SIGKILL")]  # the last ends process 1
    (root / "jobs.json").write_text(json.dumps([job | {"port": port()} for job in jobs]))
    both = [subprocess.Popen([sys.executable, "-W", "error", "-m", "tests.two_processes", root / "jobs.json", root / f"{rank}.pt"],
                             cwd=ROOT, env=os.environ | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank, place in enumerate(meeting(2))]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, -signal.SIGKILL], said
    found = [torch.load(root / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    two_processes.whole_run(of("SIGUSR2"), 0)
    return root, found


def folder_of(root, name: str):
    (folder,) = (root / name).glob("e/runs/*")
    return folder


def weights(folder) -> dict:
    return load_file(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text() / "state.safetensors")


def status(folder) -> dict:
    return json.loads((folder / "status.json").read_text())


# ------------------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_take_the_steps_of_one(stage, config, monkeypatch, arm):
    """Sampled ids exactly; weights, moments, labels and metrics to rounding; and both processes bit for bit."""
    monkeypatch.setattr(confession, "parsed", two_processes.spoken)
    one, (first, second) = two_processes.steps(config(*SMALL, *ARMS[arm]), ALONE), [found[arm] for found in stage[1]]
    for name in ("weights", "optimizer", "memory"):
        assert first[name].keys() == second[name].keys() == one[name].keys()
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())
    assert first["ids"] == second["ids"] == one["ids"]
    assert moved_alike(one["weights"], first["weights"], one["start"])
    assert moved_alike(one["optimizer"], first["optimizer"], {name: torch.zeros_like(value) for name, value in one["optimizer"].items()})
    assert close_rows(one["rows"], first["rows"])
    for ours, theirs in zip(one["scores"], first["scores"]):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def alike(one, two) -> None:
    start = {name: torch.zeros_like(value) for name, value in weights(one).items()}
    assert moved_alike(weights(one), weights(two), start)
    assert close_rows(Record(one / "metrics.jsonl").rows(), Record(two / "metrics.jsonl").rows())
    for name in ("audit.jsonl", "rollouts.jsonl", "eval/base.json", "eval/as_trained.json", "eval/as_deployed.json"):
        assert (one / name).read_text() == (two / name).read_text(), name
    assert status(two)["state"] == "done"


def test_a_run_goes_on_with_another_number_of_processes(stage):
    """Here from two to one, after a signal to the second alone stopped both."""
    root, found = stage
    assert [one["SIGUSR2"]["error"] for one in found] == ["Stopped", "Stopped"]
    alike(folder_of(root, "one"), folder_of(root, "SIGUSR2"))
    assert processes(folder_of(root, "SIGUSR2")) == [2, 1]


def processes(folder) -> list[int]:
    """How many each attempt had."""
    return [json.loads(file.read_text())["processes"] for file in sorted((folder / "attempts").glob("*.json"))]


def test_the_launchers_runner_starts_a_process_per_gpu(stage):
    """And from one to two: one frozen folder, one log, one end; what it computes is the run of one process."""
    root, _ = stage
    folder = folder_of(root, "one_then_two")
    code = {"folder": str(ROOT), "python": sys.executable, "cwd": str(ROOT)}
    write_plan(SweepPlan(folder.parent.parent, code, [], settings_of(settings("local")), []))
    done = subprocess.run([sys.executable, "-m", "launchers.runner", folder], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "LAUNCHERS_PROCESSES": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    alike(folder_of(root, "one"), folder)
    assert [(row["event"], row.get("cause")) for row in launches(folder)] == [("start", None), ("end", "finished")]
    assert processes(folder) == [1, 2]
    assert done.stdout.count("resuming at step 2") == done.stdout.count("step    4/4") == done.stdout.count("as_trained hack") == 1


def test_one_process_opens_no_connection(config, tmp_path):
    with started({}) as world:
        assert world is ALONE and not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------ failures


def test_an_error_of_one_process_ends_both_and_the_first_writes_it_down(stage):
    root, found = stage
    for rank in (0, 1):
        assert (found[rank]["error"]["error"], found[rank]["error"]["said"]) == ("ZeroDivisionError", "the second GPU is on fire")
    said = status(folder_of(root, "error"))
    assert said["state"] == "failed" and said["error"] == "ZeroDivisionError: the second GPU is on fire"
    assert "raised in process 1" in said["traceback"] and "in happens" in said["traceback"]


def test_what_ends_a_run_as_collapsed_does_so_in_every_process(stage):
    root, found = stage
    assert [set(one["not finite"]) for one in found] == [{"folder"}, {"folder"}]
    folder = folder_of(root, "not finite")
    assert status(folder)["state"] == "collapsed" and status(folder)["cause"] == "not finite in step 1: loss is inf"
    assert (folder / "eval" / "as_deployed.json").exists()


def test_a_process_that_is_gone_ends_the_other_at_once(stage):
    root, found = stage
    assert found[0]["SIGKILL"]["error"] == "ProcessLost" and "SIGKILL" not in found[1]
    said = status(folder_of(root, "SIGKILL"))
    assert said["state"] == "failed" and "process 0 of 2 lost another one" in said["error"]
    assert len(Record(folder_of(root, "SIGKILL") / "metrics.jsonl").rows()) == 1


def test_processes_that_were_started_otherwise_are_refused_with_both_values(stage):
    root, found = stage
    for rank in (0, 1):
        assert found[rank]["words"]["error"] == "Disagreement"
        assert "the start: config.optimizer.lr is 0.005 in process 0 and 0.01 in process 1" in found[rank]["words"]["said"]
    assert not (root / "words").exists() or not list((root / "words").glob("e/runs/*/status.json"))


class Talking(World):
    """A process whose exchange is replaced: the second says what the test wants."""

    def __init__(self, its: dict) -> None:
        super().__init__(0, 2)
        self.its = its

    def _exchange(self, own):
        return [own.value, self.its]


@pytest.mark.parametrize(("its", "said"), [
    ({"step": 5}, "step 4: step is 4 in process 0 and 5 in process 1"),
    ({"step": 4, "commit": "abc"}, "step 4: commit is 'nothing' in process 0 and 'abc' in process 1")])
def test_another_step_or_commit_is_refused(its, said):
    with pytest.raises(Disagreement, match=said):
        Talking(its).agree("step 4", {"step": 4})
    Talking({"step": 4, "x": float("nan")}).agree("step 4", {"step": 4, "x": float("nan")})


def test_code_and_config_are_compared_leaf_by_leaf():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert set(code_identity()) == {"commit", "difference", "torch"}


@pytest.mark.parametrize(("count", "size"), [(7, 2), (1, 3), (0, 2), (12, 4)])
def test_shares_cover_everything_in_order(count, size):
    parts = [World(rank, size).share(range(count)) for rank in range(size)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ------------------------------------------------------------------------------------------------ who starts them

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "3"}


def test_a_process_knows_its_place_from_torchrun_or_srun():
    assert place_of(TORCHRUN) == Place(1, 2, 1, "127.0.0.1", 29500, False)
    assert place_of(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosted
    assert place_of(SRUN) == Place(3, 4, 3, "127.0.0.1", 10616, False)
    assert place_of(SRUN | TORCHRUN) == place_of(TORCHRUN)  # the launchers' runner within a step of SLURM
    assert place_of(SRUN | {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "n1"}).address == "n1"


def test_one_process_and_a_batch_script_are_alone():
    for environment in ({}, TORCHRUN | {"WORLD_SIZE": "1"}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}):
        assert place_of(environment) is None
    assert place_of({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


def test_a_place_that_is_not_told_is_refused():
    with pytest.raises(ValueError, match="WORLD_SIZE=2 says several processes, and RANK, MASTER_PORT is not set; start them with torchrun"):
        place_of({key: value for key, value in TORCHRUN.items() if key not in ("RANK", "MASTER_PORT")})
    with pytest.raises(ValueError, match="export MASTER_ADDR="):
        place_of(SRUN | {"SLURM_STEP_NUM_NODES": "2"})
    with pytest.raises(ValueError, match="a process number below the number of processes; got 2 of 2"):
        place_of(TORCHRUN | {"RANK": "2"})


def test_a_sweep_is_not_started_by_several_processes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo_routing", "-m", "seed=0,1"])
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        entry.main()
    assert refused.value.code == 2 and "expected one run in several processes; got a sweep (-m)" in capsys.readouterr().err


def test_the_batch_script_asks_for_the_gpus_of_one_task_and_says_how_many_processes(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(0o755)  # submitit writes a batch script only where it finds one; none is started here
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    code = {"folder": str(ROOT), "python": sys.executable, "cwd": str(tmp_path)}
    for resources, gpus, count in (({"gpus": 2}, "2", "2"), ({"gpus": 0, "gres": "gpu:a100:4"}, None, "4"), ({"gpus": 0}, None, "1"),
                                   ({"gpus": 0, "gres": "gpu:2"}, None, "2"), ({"gpus": 0, "gres": "gpu:a100"}, None, "1"),
                                   ({"gpus": 0, "gres": "tmp:10G"}, None, "1")):
        said = settings("slurm")
        plan = SweepPlan(tmp_path, code, [], settings_of(said | {"resources": said["resources"] | resources}), [])
        executor = SlurmExecutor(tmp_path / "slurm", python=sys.executable)
        executor.update_parameters(**slurm.parameters(plan, "name", plan.settings.resources, 1))
        lines = executor._make_submission_file_text("the worker", "1").splitlines()
        assert f"export LAUNCHERS_PROCESSES={count}" in lines and "#SBATCH --ntasks-per-node=1" in lines
        assert (f"#SBATCH --gpus-per-node={gpus}" in lines) == (gpus is not None)
        assert lines.index(f"export LAUNCHERS_PROCESSES={count}") < next(at for at, line in enumerate(lines) if line.startswith("srun"))


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)])
def test_workers_that_go_on_after_one_has_failed_are_ended(tmp_path, monkeypatch, ends, code):
    """Rank 1 ends at once; rank 0 would go on for a minute, or ends by itself where nothing has failed."""
    monkeypatch.setattr(workers, "GRACE", 0.1)
    stays = 60 if code else 0
    program = (f"import os, sys, time; print(os.environ['RANK'], flush=True)\nif os.environ['RANK'] == '1': {ends}\n"
               f"else: time.sleep({stays})")
    began = time.monotonic()
    both = Workers([sys.executable, "-S", "-c", program], str(tmp_path), dict(os.environ), 2)
    while any(process.poll() is None for process in both.processes):
        both.tend()
        time.sleep(0.02)
    assert both.wait() == code and time.monotonic() - began < 30
    assert sorted(both.output.read().split()) == [b"0", b"1"]
    both.output.close()
