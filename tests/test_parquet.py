"""results.parquet has every run and state of the policy, in one schema, whoever writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

from grpo_routing.parquet import FILE, OF_LAUNCH, OF_ROW
from grpo_routing.report import load, main, write
from launchers.collect import collect
from launchers.plan import Entry, SweepPlan
from launchers.settings import settings_of
from launchers.status import RunStatus
from tests.test_launchers import settings
from tests.test_report import HELD_OUT, PERSONA, PERSONA_RANDOM, ROUTE, SVD, config, make_run


def half(experiment: Path) -> Path:
    """Finished: two seeds of vanilla, a method and its control of one name. Not finished: one that stopped, one that nobody began."""
    for seed in (0, 1):
        make_run(experiment, config("vanilla", seed), trained={"hack": 0.75 + seed / 8, "lazy": None})
    for control, source in (("none", PERSONA), ("random", PERSONA_RANDOM)):
        folder = make_run(experiment, config("route", **SVD, **ROUTE, **source), quarantine=1.0, deployed={"hack": 0.125})
        folder.rename(folder.with_name(f"{folder.name}-{control}"))
    make_run(experiment, config("vanilla", 2), status={"state": "failed", "error": "boom"}, steps=3)
    (experiment / "runs" / "fresh").mkdir()
    return experiment


def rows_of(experiment: Path) -> list[dict]:
    return parquet.read_table(experiment / FILE).to_pylist()


def test_the_report_writes_what_results_json_says_and_what_the_row_is(tmp_path):
    assert main([str(half(tmp_path))]) == 0
    rows = rows_of(tmp_path)
    assert [{key: value for key, value in row.items() if key not in (*OF_ROW, *OF_LAUNCH)} for row in rows] == load(tmp_path)
    assert len(rows) == 6 * 3 and rows == sorted(rows, key=lambda row: row["run"])
    deployed = {row["run"]: row for row in rows if row["state"] == "as_deployed"}
    assert {name: row["label"] for name, row in deployed.items()} == {
        "fresh": None, "route-held_out-s0-none": "route", "route-held_out-s0-random": "route control=random",
        "vanilla-held_out-s0": "vanilla", "vanilla-held_out-s1": "vanilla", "vanilla-held_out-s2": None}
    assert [(row["hack"], row["lazy"], row["launch_state"]) for row in rows if row["run"] == "vanilla-held_out-s1"] == [
        (0.5, 0.5, None), (0.875, None, None), (0.875, None, None)]
    assert (deployed["vanilla-held_out-s2"]["status"], deployed["vanilla-held_out-s2"]["cause"]) == ("failed", "boom")


def test_a_setting_is_what_two_rows_must_share(tmp_path):
    same = {"vanilla": {}, "erase": {"projection": {"name": "erase"}}, "no_loophole": {"loophole__pays": False}}
    other = {"svd": SVD, "longer": {"trainer__steps": 7}, "told": {"loophole__known": HELD_OUT}, "judged": {"evaluation__problems": 20}}
    for arm, choices in (same | other).items():
        make_run(tmp_path, config(arm, **choices))
    make_run(tmp_path, config("vanilla", 1))
    write(tmp_path)
    of = {row["arm"]: row["setting"] for row in rows_of(tmp_path)}
    assert len({of[arm] for arm in same}) == 1 and len(set(of.values())) == 1 + len(other)
    assert len({row["setting"] for row in rows_of(tmp_path) if row["arm"] == "vanilla"}) == 1


def test_files_of_two_experiments_can_be_put_together(tmp_path):
    (tmp_path / "hardly" / "runs" / "fresh").mkdir(parents=True)
    for experiment in (half(tmp_path / "half"), tmp_path / "hardly"):
        write(experiment)
    tables = [parquet.read_table(tmp_path / name / FILE) for name in ("half", "hardly")]
    assert not [field for field in tables[1].schema if field not in tables[0].schema], "one type, measured or not"
    assert pyarrow.concat_tables(tables, promote_options="default").num_rows == 7 * 3


def test_collect_adds_what_the_launcher_knows_and_nothing_else(tmp_path):
    write(half(tmp_path))
    alone = rows_of(tmp_path)
    entries = [Entry(f"vanilla-held_out-s{seed}", "vanilla", "held_out", seed, 6, {"minutes": 60, "gpus": 0}) for seed in (0, 2)]
    found = [RunStatus(entries[0], "done", "", "", "7_0", 6, 0.5, None, None, 1, {}),
             RunStatus(entries[1], "failed", "out_of_memory", "", "7_1", 3, 0.5, None, None, 4, {"out_of_memory": 4})]
    said = collect(SweepPlan(tmp_path, {}, [], settings_of(settings("local")), entries), found)
    assert "4 of 6 runs finished" in said and json.loads((tmp_path / "results.json").read_text()) == load(tmp_path)
    rows = rows_of(tmp_path)
    launched = {row["run"]: tuple(row[key] for key in OF_LAUNCH) for row in rows}
    assert launched == dict.fromkeys(launched, (None,) * 3) | {
        "vanilla-held_out-s0": ("done", None, 1), "vanilla-held_out-s2": ("failed", "out_of_memory", 4)}
    assert [row | dict.fromkeys(OF_LAUNCH) for row in rows] == alone
