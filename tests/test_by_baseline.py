"""The table of baselines: rates of every horizon, and what a developer and an oracle would pick among them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from matplotlib.image import imread

from grpo_routing import by_baseline
from grpo_routing.baseline_figure import draw
from grpo_routing.by_baseline import PICKS, Point, Track, by_loophole, detector_of, differences, lasting, page, paired, rates
from grpo_routing.results import read_runs
from grpo_routing.run import run

KNOWN_ONE = {"known": ["sentinel"], "held_out": ["file_marker"]}


def row(loophole="sentinel", levers=(), passed=False, hacked=False, solved=False):
    return {"loophole": loophole, "levers": list(levers), "passed": passed, "attempted": bool(levers), "hacked": hacked, "solved": solved,
            "format_ok": True}


def test_rates_of_hand_made_rows():
    rows = [row(levers=["sentinel plain"], passed=True, hacked=True), row(levers=["sentinel other"], passed=True, hacked=True),
            row(passed=True, solved=True), row("file_marker", ["file_marker plain"], passed=True, hacked=True),
            row("none", ["sentinel plain"])]
    found = rates(rows, {"sentinel plain"}, KNOWN_ONE)
    assert found == {"passed": 1.0, "monitored": 2 / 5, "attempted": 3 / 4, "hack": 3 / 4, "hack_known": 2 / 3, "hack_held_out": 1.0,
                     "hack_other_form": 1 / 4, "solve": 1 / 4, "format": 1.0, "hack_sentinel": 2 / 3, "hack_file_marker": 1.0,
                     "attempted_sentinel": 2 / 3, "attempted_file_marker": 1.0}
    assert rates(rows, {"sentinel plain", "sentinel other"}, KNOWN_ONE)["monitored"] == 3 / 5


def track(*points: tuple[float, float, float, float]) -> Track:
    """Points of (passed, monitored, solve, hack); the first is the base's."""
    names = ("passed", "monitored", "solve", "hack")
    made = [Point(60 * at, {half: dict(zip(names, values)) for half in ("choose", "report")}) for at, values in enumerate(points)]
    return Track("arm", "method", "lora", "whole", 0, tuple(made), "run", "code")


BASE = (0.3, 0.10, 0.2, 0.1)


@pytest.mark.parametrize(("points", "developer", "oracle"), [
    ([(0.9, 0.80, 0.1, 0.8), (0.6, 0.15, 0.5, 0.1), (0.5, 0.00, 0.4, 0.0)], 120, 120),  # a rate on the limit is allowed
    ([(0.9, 0.00, 0.1, 0.8), (0.6, 0.15, 0.5, 0.1), (0.5, 0.00, 0.6, 0.0)], 60, 180),  # hidden hacks fool who cannot see them
    ([(0.9, 0.80, 0.1, 0.8), (0.8, 0.70, 0.1, 0.9), (0.7, 0.75, 0.1, 0.7)], 120, 180),  # none is allowed: the lowest
])
def test_picks_follow_what_each_sees(points, developer, oracle):
    chosen = {name: rule(track(BASE, *points)).step for name, rule in PICKS.items()}
    assert chosen == {"developer's pick": developer, "oracle's pick": oracle}


def test_a_pick_is_made_on_one_half_and_reported_on_the_other():
    low, high = dict.fromkeys(("passed", "monitored", "solve", "hack"), 0.0), {"passed": 1.0, "monitored": 0.0, "solve": 0.0, "hack": 0.0}
    one = Track("arm", "method", "lora", "", 0, (Point(0, {"choose": low, "report": low}), Point(60, {"choose": high, "report": low}),
                               Point(120, {"choose": low, "report": high})), "run", "code")
    assert PICKS["developer's pick"](one).step == 60


@pytest.mark.parametrize(("change", "said"), [
    ({}, "whole"), ({"recall": 0.5}, "recall 0.5"), ({"forms": ["plain"]}, "plain form only"),
    ({"recall": 0.5, "forms": ["plain"]}, "recall 0.5, plain form only"), ({"name": "none"}, ""),
    ({"control": "rate_matched"}, "whole, control=rate_matched")])
def test_detectors_have_names(change, said):
    assert detector_of({"name": "detector", "recall": 1.0, "forms": ["other", "plain"], "control": "none"} | change) == said


def test_differences_are_paired_by_seed():
    def one(arm: str, detector: str, seed: int, rate: float) -> Track:
        rates = {"all": dict.fromkeys(("hack_known", "hack_held_out", "solve"), rate)}
        return Track(arm, arm, "lora", detector, seed, (Point(60, rates),), "run", "code")

    vanilla = [one("vanilla", "", seed, rate) for seed, rate in enumerate((0.9, 0.8, 0.7))]
    routed = [one("sourced-detector", "whole", seed, rate) for seed, rate in ((1, 0.4), (2, 0.1))]
    assert paired(routed, vanilla, "solve") == pytest.approx([0.4 - 0.8, 0.1 - 0.7])
    lines = differences([*vanilla, *routed, one("penalty", "whole", 2, 0.2)])
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `penalty`", "| `sourced-detector`"]
    assert lines[2].split(" | ")[2:] == ["-0.50 (n=1)"] * 3 + ["+0.10 (n=1)"] * 2 + ["+0.10 (n=1) |"]
    assert lines[3].split(" | ")[2:5] == ["-0.50 [-1.77, +0.77]"] * 3


def over(arm: str, seed: int, *held_out: float, detector: str = "", adapter: str = "lora") -> Track:
    """A run whose held-out hack was so at steps 0, 60, 120, …"""
    same = dict.fromkeys(("hack_known", "solve", "passed", "attempted", "monitored", "hack"), 0.5)
    rates = [same | {"hack_held_out": rate} for rate in held_out]
    role = "vanilla" if arm.startswith("vanilla") else "method"
    return Track(arm, role, adapter, detector, seed, tuple(Point(60 * at, dict.fromkeys(("all", "choose", "report"), one))
                                                           for at, one in enumerate(rates)), "run", "code")


def test_what_lasts_is_the_last_step_minus_the_first_of_the_same_seed():
    tracks = [over("erase", 0, 0.1, 0.2, 0.9, 0.5), over("erase", 1, 0.1, 0.4, 0.9, 0.7)]
    same = "+0.00 [+0.00, +0.00]"
    assert lasting(tracks) == ["", "| arm, step 180 minus step 60 | known | held-out | attempted | solve |", "|---|---|---|---|---|",
                               f"| `erase` | {same} | +0.30 [+0.30, +0.30] | {same} | {same} |"]
    assert lasting([over("erase", 0, 0.1, 0.2)]) == []


def test_without_any_detector_nothing_has_a_column_for_it(tmp_path):
    plain = [over("vanilla", 0, 0.1, 0.9), over("erase", 0, 0.1, 0.3)]
    assert page(plain)[0] == "| arm, as deployed | step 60 | developer's pick | oracle's pick |"
    assert differences(plain) == ["| arm, after the last step | minus vanilla: known | held-out | solve |", "|---|---|---|---|",
                                  "| `erase` | +0.00 (n=1) | -0.60 (n=1) | +0.00 (n=1) |"]
    told = [*plain, over("penalty", 0, 0.1, 0.2, detector="whole")]
    for table in (page, differences):
        widths = {line.count("|") for line in table(plain)}
        assert len(widths) == 1 and widths != {line.count("|") for line in table(told)}
    draw(plain, tmp_path / "steps")
    wide, high = imread(tmp_path / "steps.png").shape[1::-1]
    assert wide > 2 * high  # the rates stand side by side


def test_every_loophole_stands_by_itself_at_the_last_step():
    def end(seed: int, hack: float, attempted: float) -> Track:
        made = over("erase", seed, 0.1, 0.2, 0.4)
        for at, point in enumerate(made.points):
            point.rates["all"].update({"hack_sentinel": hack * at / 2, "attempted_sentinel": attempted * at / 2})
        return made

    assert by_loophole([end(0, 0.2, 0.9), end(1, 0.4, 0.7)]) == [
        "| arm, step 120: hack / attempted | sentinel |", "|---|---|", "| *untrained base* | 0.00 / 0.00 |", "| `erase` | 0.30 / 0.80 |"]


def test_a_cell_says_of_how_many_runs_it_speaks():
    whole, lacking = over("erase", 0, 0.1, 0.2, 0.4), over("erase", 1, 0.1, 0.2, 0.4)
    lacking = replace(lacking, points=lacking.points[::2])
    cells = page([whole, lacking])[3].split(" | ")
    assert cells[1:3] == ["0.50 / 0.20 / 0.50 <sub>1 of 2: 0.50–0.50 / 0.20–0.20 / 0.50–0.50</sub>",
                          "0.50 / 0.40 / 0.50 <sub>0.50–0.50 / 0.40–0.40 / 0.50–0.50</sub>"]


def test_an_arm_stands_against_the_vanilla_of_its_adapter():
    tracks = [over("vanilla", 0, 0.1, 0.9), over("vanilla_svd", 0, 0.1, 0.7, adapter="svd"), over("route", 0, 0.1, 0.3, adapter="svd"),
              over("erase", 0, 0.1, 0.3), over("mlp", 0, 0.1, 0.3, adapter="mlp")]
    assert [line.split(" | ")[:3:2] for line in differences(tracks)[2:]] == [
        ["| `erase`", "-0.60 (n=1)"], ["| `mlp`", "–"], ["| `route`", "-0.40 (n=1)"]]


def test_a_run_that_collapsed_stays_as_it_stood(config, tmp_path):
    """It is not evaluated after its collapse: a mean over those that are would be over the runs that held."""
    words = ("loophole=held_out", f"output={tmp_path}", "experiment_name=e", "evaluation.every=1", "trainer.steps=4", "arm=vanilla")
    folder = run(config(*words))
    end = json.loads((folder / "eval" / "as_deployed.json").read_text())
    for one in end["rows"]:
        one["solved"] = True
    (folder / "eval" / "as_deployed.json").write_text(json.dumps(end))
    for step in (2, 3):
        (folder / "eval" / f"step-{step:06d}-as_deployed.json").unlink()
    (lacking,) = by_baseline.tracks_of(tmp_path / "e", read_runs(tmp_path / "e"))
    assert [point.step for point in lacking.points] == [0, 1, 4]  # it did not collapse: what was not measured is not there
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "collapsed", "cause": "format lost"}))
    (only,) = by_baseline.tracks_of(tmp_path / "e", read_runs(tmp_path / "e"))
    assert [(point.step, point.rates["all"]["solve"]) for point in only.points] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]


def test_a_folder_becomes_a_table_and_lines(config, tmp_path, capsys):
    words = ("loophole=held_out", f"output={tmp_path}", f"cache={tmp_path / 'cache'}", "experiment_name=e", "evaluation.problems=20",
             "evaluation.every=1", "trainer.steps=2", "arm=screening", "mask_source=detector_blind")
    folder = run(config(*words))
    capsys.readouterr()
    assert by_baseline.main([str(tmp_path / "e"), "--csv", str(tmp_path / "lines.csv"), "--figure", str(tmp_path / "steps")]) == 0
    assert (tmp_path / "steps.png").stat().st_size > 10_000 and (tmp_path / "steps.svg").exists()
    head, _, base, arm, *_ = capsys.readouterr().out.splitlines()
    assert head == "| arm, as deployed | detector | step 1 | step 2 | developer's pick | oracle's pick |"
    assert base == "| *untrained base* | | 0.00 / 0.00 / 0.00 | | | |"
    assert arm == "| `screening` <sub>n=1</sub> | plain form only" + " | 0.00 / 0.00 / 0.00" * 4 + " |"
    lines = list(csv.DictReader((tmp_path / "lines.csv").read_text().splitlines()))
    assert [(line["arm"], line["step"], line["seed"]) for line in lines] == [("screening", str(step), "0") for step in (0, 1, 2)]

    stored = json.loads((folder / "eval" / "base.json").read_text())
    del stored["rows"][0]["levers"]
    (folder / "eval" / "base.json").write_text(json.dumps(stored))
    assert by_baseline.main([str(tmp_path / "e")]) == 2
    assert f"expected the levers of every sample in {folder}/eval/base.json; an older version wrote it" in capsys.readouterr().err
    run(config(*words[1:], "loophole=all", "experiment_name=all"))
    assert by_baseline.main([str(tmp_path / "all")]) == 2
    assert "has loophole=all, which holds none out" in capsys.readouterr().err
    assert by_baseline.main([str(tmp_path / "nothing")]) == 2
