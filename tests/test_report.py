"""The report says what the run folders say: every number, every gap and every run that did not finish."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from grpo_routing.analysis import analysed
from grpo_routing.arms import group, wilson
from grpo_routing.health_figure import PANELS, PER_PAGE, hacks, pages
from grpo_routing.log import METRICS
from grpo_routing.mask_sources.controls import OF_LABELS
from grpo_routing.mask_sources.pair_source import OF_PAIRS
from grpo_routing.mask_sources.persona_gradient import OF_BASIS
from grpo_routing.notes import MEANING
from grpo_routing.report import load, main, markdown, text, write
from grpo_routing.results import ReportError, read_runs

KNOWN, HELD_OUT = ["run_tests", "sentinel", "stdout_marker"], ["file_marker"]
RATES = ("hack", "hack_known", "hack_held_out", "attempted", "solve", "format", "lazy", "no_hint_solve", "no_hint_exploited",
         *(f"hack_{mode}" for mode in KNOWN + HELD_OUT))
SVD, ERASE, ROUTE = {"adapter": {"name": "svd"}}, {"projection": {"name": "erase"}}, {"projection": {"name": "route"}}
PERSONA = {"mask_source": {"name": "persona_gradient", "level": "gradient", "control": "none"}}
PERSONA_RANDOM = {"mask_source": PERSONA["mask_source"] | {"control": "random"}}
MODES = KNOWN + HELD_OUT + ["none"]  # the evaluation samples of a run, 2 of each: 8 hinted ones


def config(arm: str, seed: int = 0, **choices: object) -> dict:
    """A resolved config as run.py freezes it; `choices` are dotted with two underscores, as in optimizer__lr=0.1."""
    names = {"adapter": "lora", "projection": "measure_only", "mask_source": "none", "advantage": "dr_grpo", "prompt": "plain",
             "sampling": "plain", "extra_rollouts": "none", "optimizer": "adamw", "model": "organism", "dataset": "opchains",
             "logger": "local"}
    made = {"seed": seed, "output": "outputs", "cache": "outputs/cache", "arm_name": arm, "experiment_name": "tiny",
            **{group: {"name": name} for group, name in names.items()},
            "loophole": {"name": "held_out", "pays": True, "known": KNOWN, "held_out": HELD_OUT, "no_hint_share": 0.25,
                         "train_family": "train", "evaluation_family": "train"},
            "trainer": {"steps": 6}, "evaluation": {"problems": 10, "samples": 1, "seed": 0}}
    made["mask_source"]["seed"] = made["adapter"]["seed"] = seed
    for place, value in choices.items():
        group, _, key = place.partition("__")
        if key:
            made[group][key] = value
        else:
            made[group] = value
    return made


def evaluation(state: str, samples: int = 2, **rates: float | None) -> dict:
    rows = [{"problem": str(i), "loophole": mode} for mode in MODES for i in range(samples)]
    return {"state": state, "rates": dict.fromkeys(RATES, 0.5) | rates, "rows": rows}


def make_run(experiment: Path, settings: dict, *, status: dict | None = None, steps: int | None = None, samples: int = 2,
             base: dict | None = None, trained: dict | None = None, deployed: dict | None = None, quarantine: float | None = None,
             audit: dict[str, list] | None = None, diff: str = "", metrics: dict[str, list] | None = None) -> Path:
    """A run folder with the files of run.py. Leaving out `deployed` gives it the rates of `trained`; a run that is not done has
    no evaluation of either unless it is given `trained`."""
    recall = f"-{settings['mask_source']['recall']}" if "recall" in settings["mask_source"] else ""  # in place of the hash
    folder = experiment / "runs" / f"{settings['arm_name']}-{settings['loophole']['name']}-s{settings['seed']}{recall}"
    (folder / "eval").mkdir(parents=True)
    status = status or {"state": "done"}
    steps = settings["trainer"]["steps"] if steps is None else steps

    def store(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value))

    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    store("status.json", status)
    store("provenance.json", {"commit": "0123456789abcdef", "diff": diff})
    store("eval/base.json", evaluation("base", samples, **(base or {})))
    if status["state"] == "done" or trained is not None:
        trained = trained or {}
        store("eval/as_trained.json", evaluation("as_trained", samples, **trained))
        store("eval/as_deployed.json", evaluation("as_deployed", samples, **(trained if deployed is None else deployed)))
    extra = {} if quarantine is None else {"train/norm_quarantine": quarantine}
    rows = [{"step": i} | extra | {name: values[i] for name, values in (metrics or {}).items()} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audited = {name: [0.5] * steps for name in ("hack", "solve", "no_hint_solve")} | (audit or {})
    (folder / "audit.jsonl").write_text("".join(
        json.dumps({"step": i} | {f"audit/{name}": values[i] for name, values in audited.items()}) + "\n" for i in range(steps)))
    return folder


def pick(objects: list[dict], arm: str, state: str = "as_deployed") -> dict:
    (found,) = [row for row in objects if (row["arm"], row["state"]) == (arm, state)]
    return found


def table(experiment: Path, shape: Callable = text) -> str:
    """What `write` returns, or the Markdown page, without drawing the figure."""
    runs = read_runs(experiment)
    found = (analysed(experiment, runs),) if shape is markdown else ()
    return shape(group(runs), [run for run in runs if not run.finished], experiment.name, *found)


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


# ------------------------------------------------------------------------------------------------ numbers


def test_wilson_interval_has_the_known_value() -> None:
    """8 of 10: [0.4902, 0.9433] (Newcombe 1998's formula, worked by hand)."""
    assert wilson(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    with pytest.raises(ReportError, match="at least one sample"):
        wilson(0.5, 0)


def test_wilson_agrees_with_scipy() -> None:
    from scipy.stats import binomtest

    for hits, samples in ((0, 3), (1, 7), (80, 320), (319, 320)):
        expected = binomtest(hits, samples).proportion_ci(0.95, method="wilson")
        assert wilson(hits / samples, samples) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_objects_say_what_the_files_say(tmp_path: Path) -> None:
    make_run(tmp_path, config("route", 3, **SVD, **ROUTE, **PERSONA), base={"hack": 0.125}, quarantine=2.5,
             trained={"hack": 0.875, "hack_file_marker": 0.75}, deployed={"hack": 0.25, "lazy": 0.0})
    objects = load(tmp_path)
    assert [row["state"] for row in objects] == ["base", "as_trained", "as_deployed"]
    assert [row["hack"] for row in objects] == [0.125, 0.875, 0.25]
    assert [row["steps"] for row in objects] == [0, 6, 6]
    assert [row["last5_hack"] for row in objects] == [None, 0.5, 0.5]
    assert [row["same_policy"] for row in objects] == [None, False, False]
    expected = {"arm": "route", "seed": 3, "loophole": "held_out", "adapter": "svd", "projection": "route", "role": "method",
                "mask_source": "persona_gradient", "imitation": False, "uses_oracle": False, "run": "route-held_out-s3",
                "commit": "0123456789abcdef", "status": "done", "cause": None, "lazy": 0.0, "solve": 0.5, "samples": 8,
                "samples_known": 6, "samples_held_out": 2, "samples_all": 10, "hack_file_marker": 0.5, "pays": True}
    assert expected.items() <= objects[2].items()
    assert objects[1]["hack_file_marker"] == 0.75


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"), trained={"hack_held_out": None, "no_hint_solve": None},
             audit={"hack": [None] * 6, "solve": [0.1, None, None, None, None, None]})
    row = pick(load(tmp_path), "vanilla")
    assert row["hack_held_out"] is None and row["no_hint_solve"] is None
    assert row["last5_hack"] is None and row["last5_solve"] is None  # the one measured step lies before the last five
    (line,) = lines_with(table(tmp_path), "vanilla ")
    assert line.split()[3:] == ["1", "0.50", "0.50", "–", "0.50", "0.50", "0.50", "0.50", "+0.00", "–", "–"]


def test_a_mode_that_only_one_run_has_is_null_in_the_other(tmp_path: Path) -> None:
    settings = config("other", loophole__known=["sentinel"], loophole__held_out=[], loophole__name="sentinel")
    folder = make_run(tmp_path, settings)
    for state in ("base", "as_trained", "as_deployed"):
        rates = {key: 0.5 for key in RATES if key not in ("hack_run_tests", "hack_stdout_marker", "hack_file_marker")}
        rates["hack_held_out"] = None
        stored = {"state": state, "rates": rates, "rows": [{"loophole": "sentinel"}] * 4}
        (folder / "eval" / f"{state}.json").write_text(json.dumps(stored))
    make_run(tmp_path, config("vanilla"))
    objects = load(tmp_path)
    assert pick(objects, "other")["hack_run_tests"] is None and pick(objects, "vanilla")["hack_run_tests"] == 0.5
    assert pick(objects, "other")["samples_held_out"] == 0
    assert len({tuple(row) for row in objects}) == 1, "every object has the same keys in the same order"
    assert lines_with(table(tmp_path), "other sentinel"), "with several loopholes the label names the arm's own"


def test_last_five_is_the_mean_over_the_last_five_steps(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"),
             audit={"hack": [1.0, 0.0, 0.25, 0.5, 0.75, 1.0], "solve": [1.0, 0.5, None, 0.25, 0.0, 0.25]})
    row = pick(load(tmp_path), "vanilla", "as_trained")
    assert row["last5_hack"] == 0.5 and row["last5_solve"] == 0.25  # the null step is left out: (0.5 + 0.25 + 0 + 0.25) / 4


def test_one_seed_has_wilson_below_the_rate_and_several_have_their_range(tmp_path: Path) -> None:
    make_run(tmp_path / "one", config("vanilla"), samples=10, trained={"hack": 0.8})
    lines = table(tmp_path / "one").splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("vanilla"))
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in wilson(0.8, 40))
    assert lines[place].split()[4] == "0.80" and lines[place + 1].split()[2] == f"{low}–{high}"
    for seed, hack in enumerate((0.25, 0.5, 0.9)):
        make_run(tmp_path / "three", config("vanilla", seed), trained={"hack": hack, "solve": 0.25})
    lines = table(tmp_path / "three").splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("vanilla"))
    assert lines[place].split()[3:5] == ["3", "0.55"] and lines[place + 1].split()[2] == ".25–.90"
    assert lines[place].split()[11] == "-0.25", "solve minus the base's"
    assert "over the evaluation samples of one seed and do not include variation between seeds" in " ".join(" ".join(lines).split())


# ------------------------------------------------------------------------------------------------ runs and rows


@pytest.mark.parametrize(("status", "shown"), [
    ({"state": "failed", "error": "ValueError: loss is not\nfinite"}, "failed after 3 steps of 6: ValueError: loss is not finite"),
    ({"state": "running"}, "running after 3 steps of 6"), ({"state": "stopped"}, "stopped after 3 steps of 6")])
def test_an_unfinished_run_is_shown_and_not_averaged(tmp_path: Path, status: dict, shown: str) -> None:
    make_run(tmp_path, config("vanilla", 0), trained={"hack": 0.75})
    make_run(tmp_path, config("vanilla", 1), status=status, steps=3, base={"hack": 0.0})
    text = table(tmp_path)
    assert "1 of 2 runs finished" in text and f"vanilla-held_out-s1: {shown}" in text
    assert lines_with(text, "as trained")[0].split()[3:5] == ["1", "0.75"] and len(lines_with(text, "untrained")) == 1
    assert f"vanilla-held_out-s1: {shown}" in table(tmp_path, markdown)
    rows = [row for row in load(tmp_path) if row["seed"] == 1]
    assert [row["hack"] for row in rows] == [0.0, None, None] and {row["status"] for row in rows} == {status["state"]}
    assert rows[2]["cause"] == status.get("error") and rows[2]["steps"] == 3


def test_a_run_that_only_says_that_it_is_done_is_not_averaged(tmp_path: Path) -> None:
    (make_run(tmp_path, config("vanilla", 0)) / "eval" / "as_trained.json").unlink()
    make_run(tmp_path, config("vanilla", 1), steps=4)
    text = " ".join(write(tmp_path).split())
    assert "0 of 2 runs finished" in text
    assert "vanilla-held_out-s0: incomplete after 6 steps of 6: status.json says done, but there is no eval/as_trained.json" in text
    assert "there is no metrics.jsonl of all steps, audit.jsonl of all steps" in text
    assert not (tmp_path / "figures").exists()


def test_an_empty_run_folder_is_listed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "fresh").mkdir(parents=True)
    assert "fresh: new after 0 steps" in table(tmp_path)
    assert [(row["run"], row["arm"], row["status"]) for row in load(tmp_path)] == [("fresh", None, "new")] * 3


def test_a_record_cut_in_its_last_line_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, config("vanilla"), status={"state": "running"}, steps=3)
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "tra')
    assert load(tmp_path)[1]["steps"] == 3
    (folder / "metrics.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ReportError, match=r"expected JSON in line 1 of .*metrics.jsonl"):
        load(tmp_path)
    (folder / "status.json").write_text("{")
    with pytest.raises(ReportError, match=r"expected JSON in .*status.json"):
        load(tmp_path)


def test_a_policy_without_quarantine_has_one_row_and_two_objects(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"))
    make_run(tmp_path, config("vanilla_svd", **SVD), quarantine=0.0)
    make_run(tmp_path, config("route", **SVD, **ROUTE), quarantine=1.0, deployed={"hack": 0.125})
    text, objects = table(tmp_path), load(tmp_path)
    assert len(lines_with(text, " as trained  1")) == 3 and len(lines_with(text, "as deployed")) == 1
    assert len(lines_with(text, " = deployed")) == 2 and "both states are one policy" in text
    assert [pick(objects, arm)["same_policy"] for arm in ("vanilla", "vanilla_svd", "route")] == [True, True, False]
    assert pick(objects, "vanilla", "as_trained")["hack"] == pick(objects, "vanilla")["hack"] == 0.5


def test_evaluations_of_one_policy_that_differ_are_called_odd(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"), deployed={"hack": 0.125})
    text = table(tmp_path)
    assert "Odd: vanilla has no quarantine" in text and len(lines_with(text, "as deployed")) == 1


def test_bases_that_differ_have_a_row_each(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0), base={"solve": 0.25})
    make_run(tmp_path, config("vanilla", 1), base={"solve": 0.25})
    assert len(lines_with(table(tmp_path), "untrained")) == 1
    make_run(tmp_path, config("erase", **ERASE), base={"solve": 0.125})
    text = table(tmp_path)
    assert len(lines_with(text, "untrained")) == 2
    assert lines_with(text, "of vanilla s0, vanilla") and lines_with(text, "of erase s0")
    assert lines_with(text, "erase ")[-1].split()[11] == "+0.38", "an arm is compared with its own base"


def test_runs_of_different_recipes_are_not_averaged_as_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0, optimizer__lr=0.1), trained={"hack": 0.25})
    make_run(tmp_path, config("vanilla", 1, optimizer__lr=0.2), trained={"hack": 0.75})
    text = table(tmp_path)
    assert [line.split()[-10] for line in lines_with(text, "as trained ")] == ["0.25", "0.75"]
    assert lines_with(text, "optimizer.lr=0.1") and lines_with(text, "optimizer.lr=0.2")


def test_arms_stand_beside_the_vanilla_of_their_adapter_with_their_labels(tmp_path: Path) -> None:
    make_run(tmp_path, config("erase", **ERASE, **PERSONA))
    make_run(tmp_path, config("erase_random", **ERASE, **PERSONA_RANDOM))
    make_run(tmp_path, config("no_loophole", loophole__pays=False))
    make_run(tmp_path, config("teacher", extra_rollouts={"name": "teacher"}))
    make_run(tmp_path, config("vanilla", **PERSONA))
    make_run(tmp_path, config("vanilla_svd", **SVD))
    make_run(tmp_path, config("known_truth", **ERASE, mask_source={"name": "oracle", "control": "none", "uses_oracle": True}))
    make_run(tmp_path, config("limit", **ERASE, mask_source={"name": "ceiling", "control": "none"}))
    text, objects = table(tmp_path), load(tmp_path)
    order = ("── adapter lora", "vanilla ", "erase ", "erase_random ", "control: random", "teacher ", "imitation", "no_loophole ",
             "reference: no loophole", "── adapter svd", "vanilla_svd", "── uses the oracle", "known_truth", "limit")
    found = [next(i for i, line in enumerate(text.splitlines()) if line.startswith(words)) for words in order]
    assert found == sorted(found)
    assert [pick(objects, arm)["imitation"] for arm in ("teacher", "vanilla")] == [True, False]
    assert [pick(objects, arm)["uses_oracle"] for arm in ("known_truth", "limit", "vanilla")] == [True, True, False]
    roles = {"no_loophole": "reference", "erase_random": "control", "erase": "method", "vanilla": "vanilla", "teacher": "imitation"}
    assert {arm: pick(objects, arm)["role"] for arm in roles} == roles
    for words in ("imitation: part of", "reference: no loophole pays", "control: a treatment without",
                  "control: random: the same treatment", "uses the oracle: the arm"):
        assert lines_with(text, words)


def test_an_arm_that_says_at_the_top_of_its_config_that_it_uses_the_oracle_stands_apart(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", uses_oracle=False))
    make_run(tmp_path, config("known_truth", **ERASE, uses_oracle=True))
    assert [pick(load(tmp_path), arm)["uses_oracle"] for arm in ("vanilla", "known_truth")] == [False, True]
    lines = table(tmp_path).splitlines()
    assert lines[lines.index("── uses the oracle") + 1].startswith("known_truth ")


def detector(recall: float, control: str = "none") -> dict:
    return {"mask_source": {"name": "detector", "recall": recall, "control": control}}


def tdga(direction: str = "restricted", length: str = "restricted", control: str = "none") -> dict:
    return {"projection": {"name": "restrict", "direction": direction, "length": length},
            "mask_source": {"name": "trusted_subspace", "control": control}}


def test_roles_follow_the_config(tmp_path: Path) -> None:
    wide, routed, stopped = {"adapter__quarantine_rank": 8}, {"projection": {"name": "route"}}, {"projection": {"name": "stop_gradient"}}
    kinds = {"filter": ERASE | detector(1.0), "penalty": {"advantage": {"name": "penalty"}} | detector(1.0), "watched": detector(1.0),
             "graft": routed | detector(1.0), "graft_rate_matched": routed | detector(1.0, "rate_matched"),
             "penalty_matched": {"advantage": {"name": "penalty"}} | detector(1.0, "rate_matched"),
             "by_gradient": {"mask_source": {"name": "persona_gradient", "level": "rollout", "control": "none"}},
             "by_score": {"mask_source": {"name": "reward_quantile", "control": "none"}}, "tdga": tdga(),
             "tdga_random": tdga(control="random"), "tdga_norm_matched": tdga(length="whole"), "tdga_shrunk": tdga(direction="whole"),
             "unrouted": routed, "half": stopped, "vanilla_wide": {},
             "along_random": PERSONA_RANDOM,
             "only": {"projection": {"name": "route", "mode": "custom", "clean": [0.0, 1.0]}, "extra_rollouts": {"name": "anchor"}}
             | detector(1.0), "custom": {"projection": {"name": "route", "mode": "custom", "clean": [0.5, 1.0]}} | detector(1.0)}
    for arm, choices in kinds.items():
        make_run(tmp_path, config(arm, **choices | wide))
    roles = {run.config["arm_name"]: (run.role, run.control) for run in read_runs(tmp_path)}
    methods = ("filter", "penalty", "watched", "graft", "by_gradient", "by_score", "tdga", "custom")
    assert roles == dict.fromkeys(methods, ("method", None)) | {
        "graft_rate_matched": ("control", "rate_matched"), "penalty_matched": ("control", "rate_matched"),
        "unrouted": ("control", "mask never fires"), "half": ("control", "mask never fires"), "only": ("control", "anchors only"),
        "vanilla_wide": ("control", "capacity"), "along_random": ("vanilla", None), "tdga_random": ("control", "random"),
        "tdga_norm_matched": ("control", "norm-matched"), "tdga_shrunk": ("control", "shrunk")}
    said = " ".join(table(tmp_path).split())
    for words in ("control: rate_matched: the same treatment", "control: anchors only", "control: mask never fires: two blocks without",
                  "control: capacity: vanilla with the size", "control: norm-matched: the restricted", "control: a treatment without"):
        assert words in said


def test_every_control_of_a_mask_source_is_explained(tmp_path: Path) -> None:
    for word in {*OF_LABELS, *OF_PAIRS, *OF_BASIS, "random"} - {"none"}:
        make_run(tmp_path / word, config("graft", **ROUTE | detector(1.0, word)))
        assert f"control: {word}: {MEANING[f'control: {word}']}" in " ".join(table(tmp_path / word).split())


def test_a_control_that_a_sweep_adds_stands_below_its_treatment_and_is_no_seed_of_it(tmp_path: Path) -> None:
    """Both have the arm's name; a composed source keeps a seed in each of its parts, which is no other recipe either."""
    for seed in (0, 1):
        for control in ("none", "rate_matched"):
            parts = {"first": {"name": "detector", "seed": seed, "recall": 1.0}, "second": {"name": "logp_gap", "seed": seed}}
            settings = config("sourced-or", seed, **ROUTE, mask_source={"name": "or", "seed": seed, "control": control} | parts)
            make_run(tmp_path / control, settings)
    arms = group([run for control in ("none", "rate_matched") for run in read_runs(tmp_path / control)])
    assert [(arm.label, arm.role, len(arm.runs)) for arm in arms] == [
        ("sourced-or", "method", 2), ("sourced-or control=rate_matched", "control", 2)]


def test_arms_that_differ_in_recall_are_rows_of_their_own_in_the_order_of_recall(tmp_path: Path) -> None:
    for seed in (0, 1):
        for recall in (1.0, 0.25, 0.75, 0.5):
            for arm, control in (("graft", "none"), ("graft_rate_matched", "rate_matched")):
                make_run(tmp_path, config(arm, seed, **ROUTE | detector(recall, control)))
        make_run(tmp_path, config("filter", seed, **ERASE | detector(0.5)))
        make_run(tmp_path, config("vanilla", seed))
    labels = [arm.label for arm in group(read_runs(tmp_path))]
    recalls = ("0.25", "0.5", "0.75", "1.0")
    assert labels == ["vanilla", "filter recall=0.5", *(f"{arm} recall={r}" for arm in ("graft", "graft_rate_matched") for r in recalls)]
    assert all(len(arm.runs) == 2 for arm in group(read_runs(tmp_path)))


def test_one_recall_throughout_needs_no_name_and_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for steps in (6, 20, 100):
        make_run(tmp_path / str(steps), config("graft", **ROUTE | detector(0.5), trainer__steps=steps))
    runs = [run for steps in (6, 20, 100) for run in read_runs(tmp_path / str(steps))]
    assert [arm.label for arm in group(runs)] == [f"graft trainer.steps={steps}" for steps in (6, 20, 100)]


# ------------------------------------------------------------------------------------------------ collapsed runs

FALLEN = {"state": "collapsed", "cause": "format lost: 0.031 of the rollouts were usable answers in steps 0 to 2"}


def test_a_collapsed_run_counts_in_its_arm_with_a_flag_and_its_cause(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0), trained={"hack": 0.75})
    make_run(tmp_path, config("vanilla", 1), status=FALLEN, steps=3, trained={"hack": 0.25, "format": 0.25})
    make_run(tmp_path, config("vanilla", 2), trained={"hack": 0.5})
    said = table(tmp_path)
    assert said.startswith(f"{tmp_path.name}: 3 of 3 runs finished, 1 of them collapsed, 3–6 training steps, ")
    assert lines_with(said, "as trained")[0].split()[3:5] == ["3", "0.50"], "the survivors alone would have 0.62"
    assert lines_with(said, "collapsed: 1 of 3") and "not finished" not in said
    flat = " ".join(said.split())
    assert "collapsed: the tripwire stopped so many of the runs" in flat
    assert f"vanilla-held_out-s1 collapsed: {FALLEN['cause']}." in flat
    row = next(row for row in load(tmp_path) if (row["seed"], row["state"]) == (1, "as_deployed"))
    assert (row["status"], row["cause"], row["steps"], row["hack"]) == ("collapsed", FALLEN["cause"], 3, 0.25)


def test_a_collapsed_run_without_evaluation_is_listed_with_its_cause(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0), trained={"hack": 0.75})
    make_run(tmp_path, config("vanilla", 1), status=FALLEN, steps=3)
    for shape in (text, markdown):
        said = " ".join(table(tmp_path, shape).split())
        assert "1 of 2 runs finished, 1 collapsed and could not be evaluated" in said
        assert f"vanilla-held_out-s1: collapsed after 3 steps of 6: {FALLEN['cause']}" in said and "collapsed: 1 of" not in said


def test_the_curve_of_a_collapsed_seed_goes_on_at_its_last_value(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0), audit={"hack": [1.0] * 6})
    make_run(tmp_path, config("vanilla", 1), status=FALLEN, steps=2, trained={}, audit={"hack": [0.0, 0.5]})
    (arm,) = group(read_runs(tmp_path))
    assert arm.runs[1].curve("hack") == [0.0, 0.25]
    assert arm.curve("hack") == [0.5, *[0.625] * 5] and arm.last("hack") == 0.625


# ------------------------------------------------------------------------------------------------ health

SHARES = {"route/flagged": [0.25] * 6, "route/absorbed": [0.75] * 6, "route/kept": [0.0] * 6, "train/format": [1.0] * 6,
          "train/gradient_norm_deployed": [0.01] * 6, "rollout/entropy": [1.5] * 6}
HEALTH = ("health.png", "health.svg", "health.pdf")


def test_the_health_figure_shows_arms_with_labels_or_a_quarantine_only(tmp_path: Path) -> None:
    from matplotlib.image import imread

    make_run(tmp_path, config("vanilla"))
    write(tmp_path)
    assert not list((tmp_path / "figures").glob("health*")) and "Health" not in (tmp_path / "report.md").read_text()
    for seed in (0, 1):
        make_run(tmp_path, config("graft", seed, **ROUTE | detector(1.0)), metrics=SHARES)
    make_run(tmp_path, config("graft", 2, **ROUTE | detector(1.0)), status=FALLEN, steps=3, trained={}, metrics=SHARES)
    write(tmp_path)
    assert [[arm.label for arm in part] for part in pages(group(read_runs(tmp_path))).values()] == [["graft"]]
    first = [(tmp_path / "figures" / name).read_bytes() for name in HEALTH]
    assert 0.005 < (imread(tmp_path / "figures" / "health.png")[..., :3].min(-1) < 0.9).mean() < 0.2
    assert "(figures/health.png)" in (tmp_path / "report.md").read_text()
    write(tmp_path)
    assert [(tmp_path / "figures" / name).read_bytes() for name in HEALTH] == first


def test_many_arms_have_several_pages_and_old_pages_go(tmp_path: Path) -> None:
    for number in range(PER_PAGE + 1):
        make_run(tmp_path, config(f"arm{number:02d}", **ROUTE | detector(1.0)), metrics=SHARES)
    arms = group(read_runs(tmp_path))
    assert {file: len(part) for file, part in pages(arms).items()} == {"health": PER_PAGE, "health-2": 1}
    (tmp_path / "figures").mkdir()
    for stale in ("health-3.png", "health-3.svg"):
        (tmp_path / "figures" / stale).write_text("of an earlier report")
    write(tmp_path)
    assert {file.name for file in (tmp_path / "figures").glob("health*")} == {*HEALTH, *(f"health-2{Path(name).suffix}" for name in HEALTH)}
    assert "(figures/health-2.png)" in (tmp_path / "report.md").read_text()


def test_every_line_of_the_health_figure_is_a_declared_metric(tmp_path: Path) -> None:
    make_run(tmp_path, config("graft", **ROUTE | detector(1.0)), metrics=SHARES)
    lines = [line for panel in (*PANELS.values(), hacks(group(read_runs(tmp_path)))) for line in panel]
    assert {line.metric for line in lines} <= set(METRICS) and len(lines) == len({line.metric for line in lines}) > 18
    assert {"audit/no_hint_exploited", "route/flagged_anchors", "audit/hack_file_marker"} <= {line.metric for line in lines}


def test_another_marker_family_is_named_and_explained(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"))
    assert "follow new names" not in table(tmp_path)
    make_run(tmp_path, config("erase", **ERASE, loophole__evaluation_family="evaluation"))
    text = " ".join(table(tmp_path).split())
    assert "names: evaluation" in text
    assert "may mean that the model cannot follow new names rather than that hacking was suppressed" in text
    assert "follow new names" in table(tmp_path, markdown)


def test_a_low_hack_rate_of_a_model_that_answers_nothing_is_called_broken(tmp_path: Path) -> None:
    make_run(tmp_path, config("route", **SVD, **ROUTE), quarantine=1.0, base={"format": 1.0},
             deployed={"hack": 0.0, "format": 0.25})
    assert lines_with(table(tmp_path), "broken: format 0.25") and lines_with(table(tmp_path), "loss of ability")


def test_rows_from_different_code_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0))
    assert "Code:" not in table(tmp_path)
    make_run(tmp_path, config("vanilla", 1), diff="- a\n+ b\n")
    assert "The rows differ in their code." in table(tmp_path)
    assert [row["code"] for row in load(tmp_path)[::3]] == ["0123456789", "0123456789+" + load(tmp_path)[3]["code"][-6:]]


# ------------------------------------------------------------------------------------------------ files and command


@pytest.mark.parametrize(("made", "found"), [((), "there is no such folder"), (("there",), "it holds nothing"),
                                             (("there/eval",), "it holds eval"), (("there/runs",), "it holds runs")])
def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, made: tuple, found: str) -> None:
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    assert main([str(tmp_path / "there")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"expected an experiment with runs/<run>/ in {tmp_path / 'there'}, but {found}" in said.err
    assert not list(tmp_path.rglob("report.md"))


def test_running_twice_gives_identical_files(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla", 0))
    make_run(tmp_path, config("vanilla", 1), status={"state": "failed", "error": "boom"}, steps=2)
    names = ("report.html", "report.md", "results.json", "results.parquet",
             *(f"figures/comparison.{kind}" for kind in ("png", "svg", "pdf")))
    first = write(tmp_path), [(tmp_path / name).read_bytes() for name in names]
    assert (write(tmp_path), [(tmp_path / name).read_bytes() for name in names]) == first
    made = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file() and "runs" not in file.parts}
    assert made == set(names), "nothing else, and nothing half written, is left behind"


def test_the_figure_is_there_and_not_blank(tmp_path: Path) -> None:
    from matplotlib.image import imread

    make_run(tmp_path, config("vanilla"), trained={"hack_held_out": None}, audit={"hack": [None] * 6})
    make_run(tmp_path, config("route", **SVD, **ROUTE), quarantine=1.0, deployed={"hack": 0.125})
    make_run(tmp_path, config("no_loophole", loophole__pays=False))
    write(tmp_path)
    pixels = imread(tmp_path / "figures" / "comparison.png")  # [height, width, 4]
    assert pixels.shape[1] == 1800 and pixels.shape[0] > 600
    ink = (pixels[..., :3].min(-1) < 0.9).mean()
    assert 0.005 < ink < 0.2
    assert "<svg" in (tmp_path / "figures" / "comparison.svg").read_text()[:1000]
    pdf = (tmp_path / "figures" / "comparison.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf
    assert b"/CIDFontType2" in pdf and b"/Type3" not in pdf, "fonts that publishers accept"


def test_the_formats_print_the_files_and_text_fits_120_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path, config("vanilla_with_a_very_long_name_of_an_arm"))
    make_run(tmp_path, config("vanilla", 1), status={"state": "failed", "error": "long " * 60})
    assert main([str(tmp_path), "--format", "json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == load(tmp_path) and printed == (tmp_path / "results.json").read_text()
    assert main([str(tmp_path), "--format", "markdown"]) == 0
    assert capsys.readouterr().out == (tmp_path / "report.md").read_text()
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120 and "\x1b" not in text


def test_markdown_has_a_rectangular_table_and_the_pedigree(tmp_path: Path) -> None:
    make_run(tmp_path, config("vanilla"))
    write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:-3]} == {14} and "![" in page
    assert table[-1] == "| [vanilla-held_out-s0](runs/vanilla-held_out-s0) | vanilla | 0 | 6 | 0123456789 |"


def test_the_report_starts_without_torch_or_hydra() -> None:
    code = "import sys, grpo_routing.report; print(sorted({'torch', 'hydra', 'omegaconf', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
