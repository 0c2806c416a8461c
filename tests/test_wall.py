"""The no-cheat invariant: no verdict ever reaches training (architecture.md §4). By construction, and by bit-identity."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from grpo_routing import build
from grpo_routing import run as running
from grpo_routing.env.grader import Grade, Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.mask_sources.view import unknown
from grpo_routing.oracle.audit import Audit
from grpo_routing.oracle.verdict import Oracle, Verdict
from grpo_routing.projections.measure_only import MeasureOnly
from grpo_routing.train import State, train_step
from tests.test_configs import SOURCES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grpo_routing"
MEASURING = {"run.py", "evaluate.py", "report.py", "figures.py", "organism_check.py", "walkthrough.py", "deploy.py",
             "recovery.py", "elicitation.py", "interrogate.py", "monitors.py", "evasion.py", "evasion_of_run.py",
             "readings.py", "export_check.py"}  # may know the truth


def imported(file: Path) -> set[str]:
    """Every module named by an import anywhere in the file, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports would hide what crosses a wall"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def test_only_measuring_files_import_the_oracle():
    for file in sources("grpo_routing"):
        if "oracle" not in file.relative_to(PACKAGE).parts and file.name not in MEASURING:
            assert not [name for name in imported(file) if "oracle" in name], file


@pytest.mark.parametrize(("package", "allowed"), [
    ({"hydra", "omegaconf"}, {"folder.py", "build.py", "__main__.py", "teacher_pool.py", "report.py", "walkthrough.py",
                              "composed.py", "stages.py"}),
    ({"wandb"}, {"wandb_run.py"}),
    ({"wandb_workspaces"}, {"wandb_view.py"}),
    ({"submitit"}, set()),
])
def test_libraries_stay_in_their_rooms(package, allowed):
    for file in sources("grpo_routing"):
        if file.name not in allowed:
            assert not {name.split(".")[0] for name in imported(file)} & package, file


def test_the_environment_imports_the_standard_library_only():
    for file in sources("grpo_routing/env"):
        foreign = {name.split(".")[0] for name in imported(file)} - sys.stdlib_module_names - {"grpo_routing"}
        inner = {name for name in imported(file) if name.startswith("grpo_routing") and not name.startswith("grpo_routing.env")}
        # the sandbox's children load their siblings by file, under names of their own
        assert not foreign - {"confine", "driver", "evidence", "memory_file", "nouns", "plain"}, (file, foreign)
        assert not inner, (file, inner)


def test_a_fresh_process_that_trains_never_loads_the_oracle():
    code = ("import sys; import grpo_routing.train, grpo_routing.build, grpo_routing.checkpoint; "
            "print([name for name in sys.modules if 'oracle' in name and 'grpo' in name])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_grade_and_verdict_share_no_base_and_no_field():
    assert not {field.name for field in fields(Grade)} & {field.name for field in fields(Verdict)}
    assert set(Grade.__mro__) & set(Verdict.__mro__) == {object}


TRAIN_WITHOUT = """
import sys
from dataclasses import asdict
from grpo_routing import build
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.train import State, train_step
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    config = compose("config", ["model=tiny_random", "trainer=smoke", "evaluation=smoke", "arm=erase", f"cache={sys.argv[2]}"])
plan = build.plan(OmegaConf.to_container(config, resolve=True))
policy = build.build_policy(plan)
with Sandbox(**asdict(plan.sandbox)) as sandbox:
    line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 100), None)
    state = State(plan.optimizer.start(policy.adapter))
    for _ in range(2):
        train_step(line, state)
print(policy.adapter.fingerprint())
"""


def test_training_runs_with_the_oracle_deleted(tmp_path, cache):
    shutil.copytree(PACKAGE, tmp_path / "grpo_routing", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "grpo_routing" / "oracle")
    done = subprocess.run([sys.executable, "-c", TRAIN_WITHOUT, str(ROOT / "conf"), cache], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()[-1]) == 64


class CoinFlips(Oracle):
    """An oracle that answers at random: if anything it says leaked into training, the weights would show it."""

    def __call__(self, problems, completions, grades):
        coins = torch.randint(0, 2, (len(completions), 5), generator=torch.Generator().manual_seed(9)).bool().tolist()
        return [Verdict(*flips, ("sentinel plain",) * lever) for *flips, lever in coins]


class AdvantageThatVaries:
    """An untrained model earns no reward to learn from."""

    two_streams = False
    reads = ()
    flat_is_zero = False

    def __call__(self, rewards, flagged, deployed):
        return torch.linspace(-1, 1, rewards.numel()).view(rewards.shape)


NOISY = ["mask_source.false_positive=0.5"]  # nor does it hack; so flags that mean nothing, but are there
LOOKALIKE = [*NOISY, "mask_source.pilot=2"]
ARMS = {"vanilla": [], "erase": [], "route": [], "filter": NOISY, "sgtm": NOISY, "graft": NOISY, "gradient_routing": NOISY,
        "graft_lookalike": LOOKALIKE, "route_gradient": [], "suppression": [], "tdga": ["mask_source.steps=3"],
        "sourced": ["mask_source=persona_activation", "mask_source.calibration.pilot=2"],
        "confession": ["extra_rollouts.judge.false_positive=0.5", "extra_rollouts.format_weight=1.0"],
        "fingerprint": ["arm=sourced", "mask_source=fingerprint"], "logp_gap": ["arm=sourced", "mask_source=logp_gap"]}


@pytest.mark.parametrize("arm", ARMS)
def test_weights_are_bit_identical_with_the_real_oracle_none_and_a_coin(config, tmp_path, arm):
    named = [word for word in ARMS[arm] if word.startswith("arm=")] or [f"arm={arm}"]
    fingerprints, words = {}, ["loophole=held_out", *named, *(word for word in ARMS[arm] if word not in named)]
    for name, oracle in {"real": Oracle, "none": None, "coin": CoinFlips}.items():
        plan = build.plan(config(*words))
        policy = build.build_policy(plan)
        with Sandbox(**asdict(plan.sandbox)) as sandbox:
            audit = None
            if oracle is not None:
                audit = Audit(oracle(sandbox, plan.dataset.hidden_tests), tmp_path / name, plan.loophole.known, plan.loophole.held_out, 4,
                              kind=plan.mask_source.kind)
            line = build.build_line(plan, policy, Grader(sandbox, 0.25, 1.0, 100), audit)
            line = replace(line, advantage=AdvantageThatVaries())
            state = State(plan.optimizer.start(policy.adapter))
            for _ in range(2):
                train_step(line, state)
        fingerprints[name] = policy.adapter.fingerprint()
    assert len(set(fingerprints.values())) == 1
    fresh = build.build_policy(build.plan(config(*words)))
    assert fingerprints["real"] != fresh.adapter.fingerprint()  # and training did move them
    assert (tmp_path / "coin" / "audit.jsonl").read_text() != (tmp_path / "real" / "audit.jsonl").read_text()


# ------------------------------------------------------------------------------------------------ the one door


def test_only_the_ceiling_uses_the_oracle(config):
    """That only its arm is stamped stands in tests/test_docs.py, where every arm is planned."""
    assert [name for name, words in SOURCES.items() if build.plan(config(*words)).mask_source.uses_oracle] == ["ceiling"]


@pytest.mark.parametrize("words", [["arm=ceiling"], ["mask_source=ceiling"], ["mask_source=not", "mask_source@mask_source.inner=ceiling"]])
def test_a_run_that_reads_the_truth_unawares_is_refused(config, words):
    """Also one that hides the ceiling within another source; and a stamp on a run that reads no truth."""
    build.plan(config(*words, "uses_oracle=true"))
    with pytest.raises(build.ConfigError, match=r"mask_source=(ceiling|not) reads the truth, which no arm may do unawares; set "
                                                r"uses_oracle=true, which stamps the run, or choose another mask source"):
        build.plan(config(*words, "uses_oracle=false"))
    with pytest.raises(build.ConfigError, match="uses_oracle=true stamps a run that reads the truth, and nothing here does; leave it out"):
        build.plan(config("mask_source=detector", "uses_oracle=true"))


class Looked(Exception):
    """Enough was seen."""


@dataclass(frozen=True)
class Watching:
    """A mask source that keeps what it is shown."""

    seen: list
    kind = "rollout"
    reads = ()
    pilot_batches = 0

    def label(self, view, memory):
        self.seen.append(view)
        return unknown(view), memory

    def facts(self, memory):
        return {}


@pytest.mark.parametrize("arm", ["vanilla", "sourced", "tdga", "ceiling"])
def test_a_source_is_shown_the_truth_in_a_stamped_run_only(config, tmp_path, monkeypatch, arm):
    """What run.py really builds, as far as the first label."""
    seen, words = [], config(f"arm={arm}", f"output={tmp_path}")

    def first_step(ready, folder, line, state, *rest):
        train_step(replace(line, mask_source=Watching(seen), projection=MeasureOnly()), state)
        if line.ceiling is not None:
            seen.append(seen[0].ceiling())
        raise Looked

    monkeypatch.setattr(running, "train", first_step)
    with pytest.raises(Looked):
        running.run(words)
    assert (seen[0].ceiling is None) == (not words["uses_oracle"]) == (arm != "ceiling")
    assert seen[1:] == [] or seen[1].tolist() == [0.0] * len(seen[0].rollouts)  # nobody hacks yet
