"""notebooks/analysis.ipynb runs from its first cell to its last on a results.parquet alone, and its numbers are right."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from grpo_routing.compare import main as compare
from grpo_routing.parquet import write_parquet
from grpo_routing.results import read_runs
from launchers.collect import collect
from launchers.plan import Entry, SweepPlan
from launchers.settings import settings_of
from launchers.status import RunStatus
from tests.conftest import CONF
from tests.test_compare import fill
from tests.test_launchers import settings
from tests.test_report import ERASE, PERSONA, PERSONA_RANDOM, ROUTE, SVD, config, make_run

ROOT = CONF.parent
NOTEBOOK = ROOT / "notebooks" / "analysis.ipynb"
THREE = ROOT / "docs" / "data" / "three_seeds" / "results.json"
# What a kernel does: every code cell, in order, in one namespace. Then every figure is drawn, and an expression is asked for.
KERNEL = """
import json, sys
from pathlib import Path
import numpy as np
namespace = {"__name__": "__main__"}
for cell in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "cell " + cell["id"], "exec"), namespace)
from matplotlib import pyplot
for number in pyplot.get_fignums():
    figure = pyplot.figure(number)
    figure.canvas.draw()
    ink = (np.asarray(figure.canvas.buffer_rgba())[..., :3].min(-1) < 230).mean()
    assert 0.005 < ink < 0.2, ink
print(repr(eval(sys.argv[2], namespace)))
"""
COMPUTED = """{"arms": list(arms), "unfinished": list(unfinished), "refused": refused, "differences": differences, "p": p_values,
    "broken": broken, "same": same, "front": front, "figures": len(pyplot.get_fignums()), "bases": bases,
    "intervals": {key: (one.low, one.mean, one.high) for key, one in intervals.items()},
    "means": {(label, state, rate): mean(label, state, rate) for label in arms for state in arms[label] for rate in (*RATES, "hack")}}"""


def execute(table: Path | None, expression: str = COMPUTED) -> subprocess.CompletedProcess:
    """In a process of its own that starts, as Jupyter does, in the notebook's folder."""
    environment = {key: value for key, value in os.environ.items() if key != "GRPO_ROUTING_RESULTS"}
    environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"} | ({"GRPO_ROUTING_RESULTS": str(table)} if table else {})
    return subprocess.run([sys.executable, "-W", "error", "-c", KERNEL, str(NOTEBOOK), expression], cwd=NOTEBOOK.parent, env=environment,
                          capture_output=True, text=True)


def computed(table: Path | None) -> tuple[dict, str]:
    """What the notebook computed, and what it printed."""
    done = execute(table)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    return ast.literal_eval(last), " ".join("\n".join(said).split())


def alone(experiment: Path) -> Path:
    """The table where nothing else is that could be read."""
    (experiment.parent / "alone").mkdir()
    return (experiment / "results.parquet").rename(experiment.parent / "alone" / "results.parquet")


def test_the_committed_notebook_opens_in_jupyter_and_keeps_no_output():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"], book["metadata"]["kernelspec"]["name"]) == (4, 5, "python3")
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in book["cells"] if cell["cell_type"] == "code")


def test_the_committed_table_says_what_its_results_json_says():
    found, said = computed(None)
    rows = json.loads(THREE.read_text())

    def rates(arm: str, rate: str, state: str = "as_deployed") -> list[float]:
        return [row[rate] for row in sorted(rows, key=lambda row: row["seed"]) if (row["arm"], row["state"]) == (arm, state)]

    assert found["arms"] == ["vanilla", "erase", "erase_random", "no_loophole", "vanilla_svd", "route", "route_random"]
    for (arm, state, rate), value in found["means"].items():
        assert value == pytest.approx(fmean(rates(arm, rate, state)), abs=1e-12)
    for (arm, rate), by_seed in found["differences"].items():
        other = rates("vanilla_svd" if arm.startswith("route") else "vanilla", rate)
        assert by_seed == pytest.approx({seed: own - other[seed] for seed, own in enumerate(rates(arm, rate))}, abs=1e-12)
    assert len(found["differences"]) == 5 * 3 and set(found["p"].values()) == {0.5, 1.0}  # Holm: two methods; three seeds have 0.25
    assert found["broken"] == {"route", "route_random"} and found["front"] == ["erase", "vanilla_svd"]
    assert found["unfinished"] == [] and found["refused"] == {} and len(found["bases"]) == 1 and found["figures"] == 3
    assert "21 runs, 0 of them not finished" in said and "With 3 seeds no p is below 0.25" in said


SEEDS = range(6)


def half_finished(root: Path) -> Path:
    """A sweep of which one run failed, one works, one did not begin and one collapsed; collected."""
    hacks = {"vanilla": 0.75, "erase": 0.25, "erase_random": 0.75, "filter": 0.125, "no_loophole": 0.0}
    choices = {"vanilla": {}, "erase": ERASE | PERSONA, "erase_random": ERASE | PERSONA_RANDOM, "filter": ERASE,
               "no_loophole": {"loophole__pays": False}}
    for arm, hack in hacks.items():
        for seed in SEEDS:
            if (arm, seed) == ("erase_random", 5):
                make_run(root, config(arm, seed, **choices[arm]), status={"state": "failed", "error": "out of\nmemory"}, steps=2)
                continue
            fallen = {"status": {"state": "collapsed", "cause": "dead"}, "steps": 3} if (arm, seed) == ("erase", 5) else {}
            sign = -1 if (arm, seed) == ("filter", 0) else 1  # one of its seeds hacks more than vanilla
            make_run(root, config(arm, seed, **choices[arm]), base={"hack": 0.125, "format": 1.0}, **fallen, trained={
                "hack": hack + seed / 64, "hack_known": 0.75 + seed / 64 - sign * (0.75 - hack), "hack_held_out": None,
                "solve": 1 - hack, "format": 0.25 if arm == "filter" else 1.0})
    for seed in SEEDS:
        make_run(root, config("route", seed, **SVD, **ROUTE), quarantine=1.0, trained={"hack": 0.5}, deployed={"hack": 0.125})
    make_run(root, config("vanilla_svd", 0, **SVD), status={"state": "running"}, steps=2)
    (root / "runs" / "fresh").mkdir()
    entries = [Entry(folder.name, folder.name.partition("-")[0], "held_out", 0, 6, {"minutes": 60, "gpus": 0})
               for folder in sorted((root / "runs").iterdir())]
    collect(SweepPlan(root, {}, [], settings_of(settings("local")), entries),
            [RunStatus(one, "done", "", "", "", 6, None, None, None, 1, {}) for one in entries])
    return alone(root)


def test_a_half_finished_sweep_is_shown_and_only_equal_seeds_are_compared(tmp_path):
    found, said = computed(half_finished(tmp_path / "sweep"))
    assert found["arms"] == ["vanilla", "erase", "erase_random", "filter", "no_loophole", "route"]
    assert found["unfinished"] == ["erase_random-held_out-s5", "fresh", "vanilla_svd-held_out-s0"]
    assert "38 runs, 3 of them not finished erase_random-held_out-s5: failed after 2 steps: out of memory fresh: new after 0" in said
    assert "erase 0 1 2 3 4 5 3 6 0123456789 1 collapsed" in said
    assert found["refused"] == {
        "erase_random": "expected the same finished seeds as vanilla; only one of them has 5",
        "route": "expected one vanilla with finished runs in its setting; there are 0"}
    assert "not compared: erase_random: expected the same finished seeds" in said

    assert found["means"]["erase_random", "as_deployed", "hack"] == 0.75 + 2 / 64, "of five seeds"
    assert found["means"]["route", "as_trained", "hack"] == 0.5 and found["means"]["route", "as_deployed", "hack"] == 0.125
    assert found["means"]["erase", "base", "hack"] == 0.125 and found["means"]["vanilla", "as_deployed", "hack_held_out"] is None
    assert found["same"] == set(found["arms"]) - {"route"}

    known = {arm: found["differences"][arm, "hack_known"] for arm in ("erase", "filter", "no_loophole")}
    assert known == {"erase": dict.fromkeys(SEEDS, -0.5), "filter": dict.fromkeys(SEEDS, -0.625) | {0: 0.625},
                     "no_loophole": dict.fromkeys(SEEDS, -0.75)}
    assert set(found["differences"]) == {(arm, rate) for arm in known for rate in ("hack_known", "solve")}, "held out was not measured"
    # sign flips by hand: all six agree, 2 of 64; one smaller sum of six equal sizes is turned, 14 of 64. Holm doubles the smaller one
    assert found["p"] == {("erase", "hack_known"): 2 * 2 / 64, ("filter", "hack_known"): 14 / 64, ("erase", "solve"): 2 * 2 / 64,
                          ("filter", "solve"): 2 * 2 / 64}
    assert found["intervals"]["erase", "hack_known"] == (-0.5, -0.5, -0.5)
    low, middle, high = found["intervals"]["filter", "hack_known"]
    assert middle == pytest.approx(-4 * 0.625 / 6) and low < -0.625 and 0 < high < 0.625
    assert found["broken"] == {"filter"} and found["front"] == ["erase", "route"], "filter would beat erase"


def test_differences_and_p_are_those_of_the_command_that_reads_the_runs(tmp_path, capsys):
    experiment = fill(tmp_path / "sweep", seeds=6)
    write_parquet(experiment, read_runs(experiment), {})
    assert compare([str(experiment), "--csv", str(tmp_path / "t.csv")]) == 0
    capsys.readouterr()
    found, _ = computed(alone(experiment))
    lines = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    (line,) = [line for line in lines if (line["arm"], line["kind"], line["rate"]) == ("penalty", "vanilla", "solve")]
    assert list(found["differences"]["penalty", "solve"].values()) == pytest.approx([*map(float, line["seed_differences"].split())])
    assert found["p"]["penalty", "solve"] == pytest.approx(float(line["p_corrected"]))


def test_what_cannot_be_shown_is_refused(tmp_path):
    make_run(tmp_path / "none", config("vanilla"), status={"state": "running"}, steps=2)
    make_run(tmp_path / "twice", config("vanilla")).rename(tmp_path / "twice" / "runs" / "again")
    make_run(tmp_path / "twice", config("vanilla"))
    for name, words in (("none", "expected a finished run in"), ("twice", "vanilla has seed 0 twice: again and vanilla-held_out-s0")):
        write_parquet(tmp_path / name, read_runs(tmp_path / name), {})
        done = execute(tmp_path / name / "results.parquet")
        assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr
