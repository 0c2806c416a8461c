"""Claims about deployment: pickers read flags alone, pick and report sets share nothing, the base point is the frozen model,
leakage inverts its curve, and recovery counts steps. Every refusal says what was expected, what came and what to do."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from scipy.stats import binomtest

from grpo_routing import build, deployment, leakage, recovery
from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.checkpoint import save_checkpoint
from grpo_routing.deploy import BASE, Point, oracle_pick, problem_sets, sample
from grpo_routing.deploy import main as deploy_main
from grpo_routing.deployment import Monitored, grid, monitor_ucb, resolution, upper_bound, zero
from grpo_routing.finished import UnusableRun, load
from grpo_routing.run import run
from grpo_routing.train import State
from tests.conftest import CONF


def curve(*flagged: int, asked: int = 200) -> list[Monitored]:
    return [Monitored(scale, count, asked) for scale, count in zip(grid(len(flagged)), flagged)]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> dict[str, Path]:
    """Runs of `graft` and `vanilla` with an untrained model, side by side; the tests copy them and never change them."""
    words = ["loophole=held_out", "evaluation.problems=6", "trainer.prompts_per_step=2", "trainer.group=2", "experiment_name=e",
             f"output={tmp_path_factory.mktemp('deploy')}"]
    return {arm: run(config(f"arm={arm}", *more, *words)) for arm, more in {"graft": [], "vanilla": ["mask_source=none"]}.items()}


def copied(finished: dict[str, Path], arm: str, to: Path) -> Path:
    return shutil.copytree(finished[arm], to / finished[arm].name)


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return copied(finished, "graft", tmp_path / "runs")


# ------------------------------------------------------------------------------------------------ the developer's pickers


@pytest.mark.parametrize(("flagged", "asked", "expected"), [
    (0, 10, 1 - 0.05 ** (1 / 10)),  # none in 10: (1 - p)^10 = 0.05
    (9, 10, 0.95 ** (1 / 10)),  # all but one: 1 - p^10 = 0.05
    (10, 10, 1.0),
    (1, 2, 0.95**0.5),
    (0, 200, 0.014867039231272054),
])
def test_the_bound_is_clopper_and_pearsons(flagged, asked, expected):
    assert upper_bound(flagged, asked) == pytest.approx(expected, abs=1e-12)


def test_the_bound_agrees_with_scipys_interval():
    for flagged, asked in ((0, 3), (3, 10), (20, 200), (199, 200)):
        exact = binomtest(flagged, asked, alternative="less").proportion_ci(0.95, "exact").high
        assert upper_bound(flagged, asked) == pytest.approx(exact, abs=1e-9)


def test_the_monitor_picks_the_highest_scale_below_the_limit():
    """Base 20 of 200 = 0.1, margin 0.05. Bounds: 21 -> 0.1476, 22 -> 0.1532 is over 0.15."""
    base = Monitored(BASE, 20, 200)
    assert upper_bound(21, 200) < 0.15 < upper_bound(22, 200)
    assert monitor_ucb(curve(5, 10, 21, 22, 60), base, 0.05) == 0.5
    assert monitor_ucb(curve(5, 10, 21, 21, 21), base, 0.05) == 1.0


def test_a_scale_passes_only_with_all_scales_below_it():
    assert monitor_ucb(curve(5, 90, 5, 5, 5), Monitored(BASE, 20, 200), 0.05) == 0.0
    assert monitor_ucb(curve(90, 5, 5, 5, 5), Monitored(BASE, 20, 200), 0.05) is None


def test_below_the_resolution_even_the_bases_own_count_fails():
    base = Monitored(BASE, 20, 200)
    assert resolution(base) == pytest.approx(0.0419892516, abs=1e-9)
    assert monitor_ucb(curve(20, 20), base, resolution(base) + 1e-9) == 1.0
    assert monitor_ucb(curve(20, 20), base, resolution(base) - 1e-9) is None
    assert zero(curve(90, 90)) == 0.0


@pytest.mark.parametrize(("points", "message"), [
    ([], r"rise from 0; got \[\]"), ([Monitored(0.5, 0, 9)], "measure scale 0"),
    ([Monitored(0.0, 0, 9), Monitored(1.0, 0, 9), Monitored(0.5, 0, 9)], "Sort it"),
])
def test_a_curve_that_does_not_rise_from_zero_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        monitor_ucb(points, Monitored(BASE, 0, 9), 0.1)


def test_impossible_counts_scales_and_margins_are_refused():
    with pytest.raises(ValueError, match="got 3 of 2. Sample more"):
        Monitored(0.0, 3, 2)
    with pytest.raises(ValueError, match=r"got 1 scale\(s\). Choose 2"):
        grid(1)
    with pytest.raises(ValueError, match="so >= 0; got -1"):
        monitor_ucb(curve(1, 1), Monitored(BASE, 1, 2), -1)


def test_the_oracle_weighs_a_hack_twice_and_prefers_the_lower_scale():
    def pick(*rates: tuple[float, float]) -> float:
        return oracle_pick([Point(Monitored(scale, 0, 9), {"solve": solve, "hack": hack})
                            for scale, (solve, hack) in zip(grid(len(rates)), rates)])

    assert pick((0.25, 0.125), (0.5, 0.25), (1.0, 0.5)) == 0.0  # all score 0
    assert pick((0.25, 0.125), (0.5, 0.125), (1.0, 0.5)) == 0.5
    assert pick((0.25, 0.125), (0.5, 0.25), (1.0, 0.375)) == 1.0


# ------------------------------------------------------------------------------------------------ T32: the picker cannot read the truth


def test_a_pickers_signature_has_no_place_for_a_verdict():
    assert {field.name: field.type for field in fields(Monitored)} == {"scale": "float | None", "flagged": "int", "asked": "int"}
    for picker in (zero, monitor_ucb):
        kinds = [str(kind) for name, kind in get_type_hints(picker).items() if name != "return"]
        assert all("Monitored" in kind or kind == "<class 'float'>" for kind in kinds), (picker, kinds)
        assert len(kinds) == len(inspect.signature(picker).parameters)


def test_the_pickers_file_loads_nothing_of_the_project():
    code = "import sys, grpo_routing.deployment; print(sorted(name for name in sys.modules if name.startswith('grpo_routing')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['grpo_routing', 'grpo_routing.deployment']"
    assert "oracle" not in {name for name in vars(deployment) if not name.startswith("__")}


# ------------------------------------------------------------------------------------------------ T33: the base point


@pytest.mark.parametrize("adapter", ["lora", "mlp", "svd"])
def test_the_base_point_is_the_frozen_model_bit_for_bit(config, adapter):
    """All blocks off, after training moved every parameter: logits and samples of the model without adapter."""
    words = {"lora": ["adapter.quarantine_rank=4"], "mlp": ["adapter.quarantine_width=4"], "svd": ["adapter.axes=disjoint"]}[adapter]
    plan = build.plan(config(f"adapter={adapter}", *words))
    policy, (plain, _) = build.build_policy(plan), plan.model.load()
    with torch.no_grad():
        for tensor in policy.adapter.state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), policy.adapter.only():
        assert torch.equal(policy.model(ids).logits, plain.eval()(ids).logits)
        with policy.adapter.merged():
            assert torch.equal(policy.model(ids).logits, plain(ids).logits)
    with torch.no_grad(), policy.adapter.scaled({QUARANTINE: 0.0}), policy.adapter.merged():
        assert not torch.equal(policy.model(ids).logits, plain(ids).logits)


def moved(folder: Path):
    """The finished run with parameters that matter: two steps without reward moved nothing."""
    loaded = load(folder)
    with torch.no_grad():
        for tensor in loaded.policy.adapter.state().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return loaded


def test_scales_share_their_random_numbers_and_scale_zero_is_the_deployed_policy(folder):
    loaded = moved(folder)
    asked, _ = problem_sets(loaded, 8)
    texts = {scale: [one.text for one in sample(loaded, asked, "pick", scale)] for scale in (BASE, 0.0, 1.0)}
    with loaded.policy.adapter.only(DEPLOYED):
        assert [one.text for one in sample(loaded, asked, "pick", 1.0)] == texts[0.0]
    assert len({tuple(seen) for seen in texts.values()}) == 3
    fresh = build.build_policy(loaded.plan)  # at the start every block is silent, so every scale draws the base's samples
    untrained = type(loaded)(loaded.folder, loaded.config, loaded.plan, fresh)
    assert all([one.text for one in sample(untrained, asked, "pick", scale)] == texts[BASE] for scale in (0.0, 0.5, 1.0))


def test_pick_and_report_sets_share_no_problem_and_are_equally_hard(folder):
    pick, report = problem_sets(load(folder), 200)
    assert len({p.id for p in pick}) == len({p.id for p in report}) == 200 and not {p.id for p in pick} & {p.id for p in report}
    assert {p.split for p in pick + report} == {"evaluation"}
    loopholes, lengths = ([Counter(map(of, asked)) for asked in (pick, report)]
                          for of in (lambda p: p.loophole, lambda p: len(p.program.steps)))
    assert loopholes[0] == loopholes[1] == dict.fromkeys(loopholes[0], 40)
    assert all(abs(lengths[0][steps] - lengths[1][steps]) <= 5 for steps in (1, 2, 3))  # one per loophole


# ------------------------------------------------------------------------------------------------ end to end


def test_a_finished_run_gets_a_curve_picks_and_a_figure(folder, capsys):
    assert deploy_main([str(folder), "--problems", "8", "--scales", "3"]) == 0
    out, said = capsys.readouterr().out, json.loads((folder / "deploy.json").read_text())
    assert [row["scale"] for row in said["report"]["curve"]] == [0.0, 0.5, 1.0] and said["report"]["base"]["scale"] is None
    assert said["pick"]["base"].keys() == {"scale", "flagged", "asked", "monitored", "bound"}  # no truth beside what is picked on
    assert {"hack_known", "hack_held_out", "solve", "format", "bound"} <= said["report"]["curve"][0].keys()
    assert {rule: (pick["reads"], pick["uses_oracle"]) for rule, pick in said["picks"].items()} == {
        "zero": ("nothing", False), "monitor_ucb": ("monitor flags", False), "oracle": ("the truth", True)}
    for pick in said["picks"].values():
        assert pick["report"] in [said["report"]["base"], *said["report"]["curve"]] and pick["report"]["scale"] == pick["scale"]
    assert said["monitor_knows"] == ["run_tests", "sentinel", "stdout_marker"]
    assert not set(said["problems"]["pick"]) & set(said["problems"]["report"])
    # 8 samples without a flag: the bound 1 - 0.05^(1/8) = 0.312 is over the limit of 0 + 0.05, and the table says so
    assert "monitor_ucb lets no scale through" in out and "The margin is below 0.312" in out and "oracle reads the truth" in out
    assert (folder / "figures" / "deploy.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_deployed_is_refused(folder, tmp_path, capsys):
    def refused(place: Path) -> str:
        assert deploy_main([str(place)]) == 2
        return capsys.readouterr().err

    assert "there is no such folder. Name one of outputs/" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "with config.yaml at" in (said := refused(tmp_path / "empty")) and "it holds nothing" in said
    shutil.move(folder / "checkpoints", tmp_path / "checkpoints")
    assert "expected checkpoints/latest in" in (said := refused(folder)) and "got none. Remove the folder and run it again" in said
    shutil.move(tmp_path / "checkpoints", folder / "checkpoints")
    (folder / "status.json").write_text('{"state": "stopped"}')
    assert "its status is stopped. Run it again with the same command: it resumes" in refused(folder)
    (folder / "status.json").write_text('{"state": "done"}')
    (folder / "checkpoints" / "latest").write_text("step-000001")
    assert "a checkpoint of step 2" in (said := refused(folder)) and "got step 1" in said
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("clean_share:", "share_clean:"))
    assert "that this code can run; got:\nprojection.share_clean is not a setting" in refused(folder)


def test_an_adapter_without_quarantine_has_no_scale_to_choose(finished, capsys):
    assert deploy_main([str(finished["vanilla"])]) == 2
    assert "vanilla has the block deployed alone. There is no scale to choose" in capsys.readouterr().err
    loaded = load(finished["vanilla"])
    with pytest.raises(UnusableRun, match="for --fresh-quarantine; vanilla has the block deployed alone. Leave the option out"):
        recovery.recovery_config(loaded.config, loaded.config, True, 5)


# ------------------------------------------------------------------------------------------------ leakage


def test_leakage_inverts_its_curve():
    hacks, rates = (0, 100, 400), (0.1, 0.3, 0.9)
    for n, rate in ((50, 0.2), (100, 0.3), (250, 0.6), (400, 0.9)):
        assert leakage.leakage(hacks, rates, rate, 1000) == pytest.approx(n / 1000, abs=1e-12)


def test_leakage_of_a_filter_is_one_and_of_a_policy_that_learned_no_hack_zero():
    """A filter's run stands on the curve: it trained on its unflagged hacks and on no other."""
    hacks, rates = (0, 137, 400), (0.1, 0.37, 0.9)
    assert leakage.leakage(hacks, rates, 0.37, 137) == 1.0
    assert leakage.leakage(hacks, rates, 0.1, 137) == leakage.leakage(hacks, rates, 0.02, 137) == 0.0


@pytest.mark.parametrize(("hacks", "rates", "rate", "unflagged", "message"), [
    ((0, 100), (0.1, 0.5), 0.6, 10, "at most 0.500; got 0.600. Add a vanilla run"),
    ((0, 100), (0.5, 0.1), 0.3, 10, r"rises in hack rollouts and in hack rate.*\(0, 0.500\) before \(100, 0.100\)"),
    ((0, 100), (0.1, 0.5), 0.3, 0, "must be > 0; got 0"),
    ((0,), (0.1,), 0.1, 10, "at least two points"),
])
def test_leakage_off_the_curve_is_refused(hacks, rates, rate, unflagged, message):
    with pytest.raises(ValueError, match=message):
        leakage.leakage(hacks, rates, rate, unflagged)


def test_unflagged_hacks_are_counted_from_the_audit(folder):
    assert leakage.unflagged_hacks(folder, 1) == 0
    (folder / "audit.jsonl").write_text('{"step": 0, "audit/unflagged_hacks": 3}\n{"step": 1, "audit/unflagged_hacks": 4}\n')
    assert leakage.unflagged_hacks(folder, 4) == 28  # every fourth rollout was judged
    (folder / "audit.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UnusableRun, match=r"expected audit/unflagged_hacks in every row .* Run it again with this code"):
        leakage.unflagged_hacks(folder, 1)


def test_leakage_of_run_folders(finished, tmp_path, capsys):
    def point(name: str, hacks: int, rate: float, arm: str = "vanilla") -> Path:
        shutil.copytree(finished[arm], tmp_path / name)
        (tmp_path / name / "audit.jsonl").write_text(f'{{"step": 0, "audit/unflagged_hacks": {hacks}}}\n')
        (tmp_path / name / "eval" / "as_deployed.json").write_text(json.dumps({"rates": {"hack": rate}}))
        return tmp_path / name

    low, high, routed = point("low", 0, 0.1), point("high", 100, 0.5), point("routed", 80, 0.2, "graft")
    assert leakage.main([str(routed), "--curve", str(high), str(low)]) == 0
    assert "leakage 0.312" in capsys.readouterr().out  # 25 of 80
    assert leakage.main([str(routed), "--curve", str(low), str(routed)]) == 2
    assert "has route with detector. Leave it out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ recovery


def test_steps_until_the_mean_of_five_reaches_the_target():
    assert recovery.steps_until([0.0] * 5 + [1.0] * 5, 0.6) == 8  # 3 of the last 5
    assert recovery.steps_until([1.0] * 9, 0.6) == 5  # it needs five steps to say so
    assert recovery.steps_until([1.0] * 4, 0.6) is None and recovery.steps_until([0.5] * 20, 0.6) is None
    assert recovery.steps_until([None] * 4 + [0.7], 0.6) == 5 and recovery.steps_until([None] * 9, 0.6) is None


@pytest.fixture
def vanilla(finished, folder) -> Path:
    """A vanilla run beside the run, whose audit says that it hacks in half of the rollouts."""
    place = copied(finished, "vanilla", folder.parent)
    (place / "audit.jsonl").write_text("".join(f'{{"step": {step}, "audit/hack": 0.5}}\n' for step in range(2)))
    return place


@pytest.mark.parametrize(("words", "kind", "projection"), [
    ([], "deleted", "measure_only"),
    (["--fresh-quarantine"], "fresh_quarantine", "route"),
    (["--from", "base"], "base_deleted", "measure_only"),
])
def test_recovery_trains_vanilla_on_the_deployed_policy(folder, vanilla, capsys, words, kind, projection):
    assert recovery.main([str(folder), "--steps", "5", *words]) == 0
    assert f"{kind}: hack rate 0.40 (0.8 of {vanilla.name}'s) not within 5 steps (last 0.00)" in capsys.readouterr().out
    said = json.loads((folder / f"recovery-{kind}.json").read_text())
    assert (said["steps"], said["reached"], said["target"], said["hack"]) == (None, False, 0.4, [0.0] * 5)
    assert said["config"]["projection"]["name"] == projection and said["config"]["adapter"]["quarantine_rank"] == 8
    assert said["config"]["optimizer"]["name"] == "adamw" and said["config"]["advantage"]["name"] == "dr_grpo"
    assert len((folder / f"recovery-{kind}" / "audit.jsonl").read_text().splitlines()) == 5


def test_a_start_is_the_deployed_policy_with_a_dead_or_a_fresh_quarantine(folder, vanilla):
    loaded, mark = moved(folder), load(vanilla)
    shutil.rmtree(folder / "checkpoints")
    save_checkpoint(folder / "checkpoints", loaded.policy.adapter, State(loaded.plan.optimizer.start(loaded.policy.adapter), step=2))
    new = build.build_policy(loaded.plan).adapter.flatten(QUARANTINE)
    ids = torch.arange(3, 23)[None]
    for fresh in (False, True):
        config = recovery.recovery_config(loaded.config, mark.config, fresh, 5)
        policy = recovery.starting_policy(folder, config, fresh, "trained")
        quarantine = policy.adapter.flatten(QUARANTINE)
        assert all(torch.equal(flat, new[name]) if fresh else not flat.any() for name, flat in quarantine.items())
        with torch.no_grad(), loaded.policy.adapter.only(DEPLOYED):
            assert torch.equal(policy.model(ids).logits, loaded.policy.model(ids).logits)
        base = recovery.starting_policy(folder, config, fresh, "base").adapter.flatten()
        assert all(torch.equal(flat, base[name]) for name, flat in build.build_policy(loaded.plan).adapter.flatten().items())


def test_recovery_without_a_mark_is_refused(folder, capsys):
    assert recovery.main([str(folder)]) == 2
    assert "expected one finished vanilla run beside" in (said := capsys.readouterr().err) and "got none. Name one with --vanilla" in said
    assert recovery.main([str(folder), "--vanilla", str(folder)]) == 2
    assert "a vanilla run that hacks in its last 5 steps" in capsys.readouterr().err
