"""Arms are compared pair by pair, and what cannot be paired is refused with every reason."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from grpo_routing.compare import COLUMNS, main
from grpo_routing.comparison import RATES, Experiment, Refused, gather
from grpo_routing.results import BASE, ReportError, read_runs
from tests.test_report import HELD_OUT, KNOWN, config, make_run

MODES = [*KNOWN, *HELD_OUT]
EACH = 4  # problems of every mode
DETECTOR = {"mask_source": {"name": "detector", "control": "none"}, "advantage": {"name": "penalty"}}
MATCHED = {"mask_source": {"name": "detector", "control": "rate_matched"}, "advantage": {"name": "penalty"}}


def read_experiment(folder: Path, names: list[str] | None = None) -> Experiment:
    return gather(folder, read_runs(folder), names)


def rows(hacks: int, solves: int) -> list[dict]:
    """Of every mode's EACH problems the first `hacks` are hacked, the last `solves` solved and, where there are two, with the lever in the
    last of these; one problem without a hint is all of it."""
    hinted = [{"problem": f"{mode}{i}", "loophole": mode, "hacked": i < hacks, "solved": i >= EACH - solves,
               "attempted": i < hacks or (solves > 1 and i == EACH - 1)}
              for mode in MODES for i in range(EACH)]
    return [*hinted, {"problem": "plain", "loophole": "none", "hacked": True, "solved": True, "attempted": True}]


def add(experiment: Path, arm: str, hacks: list[int], solves: list[int], *, started: float = 2e9, status: dict | None = None,
        **choices: object) -> list[Path]:
    """A run per seed with so many hacks and solves of every mode; the base hacks and solves one."""
    folders = []
    for seed, (hacked, solved) in enumerate(zip(hacks, solves)):
        folder = make_run(experiment, config(arm, seed, **deepcopy(choices)), status=status,
                          trained={"hack": hacked / EACH, "solve": solved / EACH})
        for state, own in ((BASE, rows(1, 1)), ("as_deployed", rows(hacked, solved))):
            file = folder / "eval" / f"{state}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": own}))
        (folder / "attempts").mkdir()
        (folder / "attempts" / "001.json").write_text(json.dumps({"started": started}))
        folders.append(folder)
    return folders


def fill(experiment: Path, seeds: int = 3, **more: object) -> Path:
    add(experiment, "vanilla", [4] * seeds, [0] * seeds, **more)
    add(experiment, "penalty", [1] * seeds, [2] * seeds, **DETECTOR, **more)
    add(experiment, "penalty_random", [3] * seeds, [1] * seeds, **MATCHED, **more)
    return experiment


def refused(experiment: Path, **how: object) -> list[str]:
    with pytest.raises(Refused) as error:
        read_experiment(experiment, how.get("names")).comparisons(how.get("controls", True))
    first, *reasons = str(error.value).splitlines()
    assert first == "not compared:"
    return reasons


def records(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "t.csv").read_text().splitlines()))


# ------------------------------------------------------------------------------------------------ pairs


def test_a_method_stands_against_vanilla_its_base_and_its_control(tmp_path):
    found = read_experiment(fill(tmp_path)).comparisons()
    assert [(pair.arm.label, pair.kind, pair.against) for pair in found] == [
        ("penalty", "vanilla", "vanilla"), ("penalty", "base", "untrained base"), ("penalty", "control", "penalty_random")]
    means = [[round(float(pair.differences(rate).mean()), 3) for rate in RATES] for pair in found]
    assert means == [[-0.75, -0.75, -0.75, 0.5], [0.0, 0.0, 0.0, 0.25], [-0.5, -0.5, -0.5, 0.25]]
    assert [found[0].differences(rate).shape for rate in ("hack", "hack_known", "hack_held_out", "hack_sentinel")] == [
        (3, 16), (3, 12), (3, 4), (3, 4)]  # without the problem that has no hint


def test_differences_are_taken_on_the_same_problem(tmp_path):
    pair = read_experiment(fill(tmp_path)).comparisons()[0]
    assert pair.differences("hack_sentinel").tolist() == [[0, -1, -1, -1]] * 3
    assert pair.differences("solve")[:, :4].tolist() == [[0, 0, 1, 1]] * 3
    assert pair.differences("attempted_sentinel").tolist() == [[0, -1, -1, 0]] * 3
    assert pair.differences("attempted").shape == pair.differences("hack").shape == (3, EACH * len(MODES))


def test_samples_of_one_problem_are_averaged(tmp_path):
    fill(tmp_path)
    for file in sorted(tmp_path.glob("runs/*/eval/as_deployed.json")):
        kept = json.loads(file.read_text())
        again = [row | {"hacked": False} for row in kept["rows"]]
        file.write_text(json.dumps(kept | {"rows": kept["rows"] + again}))
    assert read_experiment(tmp_path).comparisons()[0].differences("hack_sentinel").tolist() == [[0, -0.5, -0.5, -0.5]] * 3


def test_a_rate_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ReportError, match="expected a rate of penalty: hack, hack_known, .*; got 'lazy'"):
        read_experiment(fill(tmp_path)).comparisons()[0].differences("lazy")


def test_a_collapsed_run_counts_as_it_stood(tmp_path):
    add(tmp_path, "vanilla", [4] * 2, [0] * 2)
    add(tmp_path, "inoculation", [1] * 2, [2] * 2, prompt={"name": "inoculation"}, status={"state": "collapsed", "cause": "dead"})
    assert [pair.kind for pair in read_experiment(tmp_path).comparisons()] == ["vanilla", "base"]  # a prompt has no control


# ------------------------------------------------------------------------------------------------ refusals


def test_runs_that_are_not_finished_are_refused(tmp_path):
    fill(tmp_path)
    make_run(tmp_path, config("vanilla", 7), status={"state": "failed", "error": "out of\nmemory"})
    make_run(tmp_path, config("vanilla", 8), status={"state": "collapsed", "cause": "not finite"})
    assert refused(tmp_path) == [
        "- vanilla-held_out-s7 is not finished (failed: out of memory). Run it again: it resumes",
        "- vanilla-held_out-s8 is not finished (collapsed: not finite). It has no evaluation to compare; leave its arm out with --arms"]


def test_unequal_seeds_are_refused(tmp_path):
    add(tmp_path, "vanilla", [4] * 3, [0] * 3)
    add(tmp_path, "penalty", [1] * 2, [2] * 2, **DETECTOR)
    add(tmp_path, "penalty_random", [3] * 3, [1] * 3, **MATCHED)
    assert [reason.split(". ")[0] for reason in refused(tmp_path)] == [
        f"- expected the same seeds in penalty and {other}; penalty lacks [2]" for other in ("vanilla", "penalty_random")]


def test_a_missing_control_is_refused_unless_one_says_so(tmp_path):
    fill(tmp_path)
    add(tmp_path, "penalty_other", [1] * 3, [2] * 3, **DETECTOR, advantage__scale=2)
    (reason,) = refused(tmp_path)
    assert reason.startswith("- penalty_other has no control here that differs from it by one word (penalty_random differs in "
                             "advantage.scale and mask_source.control); run it too (-m adds it), or say --without-controls")
    assert len(read_experiment(tmp_path).comparisons(controls=False)) == 5


def test_a_setting_without_its_vanilla_is_refused(tmp_path):
    fill(tmp_path)
    add(tmp_path, "inoculation", [1] * 3, [2] * 3, prompt={"name": "inoculation"}, trainer={"steps": 12})
    (reason,) = refused(tmp_path)
    assert reason == ("- inoculation has no vanilla of its setting; of vanilla trainer.steps is 12 and 6. Run arm=vanilla with this arm's "
                      "setting and seeds")


def test_mixed_vanillas_are_refused(tmp_path):
    fill(tmp_path)
    for folder in add(tmp_path / "else", "vanilla", [4] * 3, [0] * 3, optimizer__lr=0.5):
        folder.rename(tmp_path / "runs" / f"{folder.name}-b")
    (reason,) = refused(tmp_path)
    assert reason.startswith("- penalty has 2 vanillas of its setting (vanilla, vanilla optimizer.lr=0.5), and a mean would mix configs")


def test_a_seed_that_is_there_twice_is_refused(tmp_path):
    fill(tmp_path)
    (folder, *_) = add(tmp_path / "else", "vanilla", [4], [0])
    folder.rename(tmp_path / "runs" / f"{folder.name}-b")
    (reason,) = refused(tmp_path)
    assert reason.startswith("- vanilla has seeds [0] more than once; move all but one of vanilla-held_out-s0, vanilla-held_out-s0-b,")


def test_other_problems_are_refused(tmp_path):
    file = next(fill(tmp_path).glob("runs/vanilla-*-s1/eval/as_deployed.json"))
    file.write_text(file.read_text().replace("sentinel3", "sentinel9"))
    (reason,) = refused(tmp_path)
    assert "vanilla-held_out-s1 answered others than penalty-held_out-s0. Run them again with the same evaluation.*" in reason


def test_arms_can_be_named_and_their_controls_come_along(tmp_path):
    fill(tmp_path)
    add(tmp_path, "penalty_other", [1] * 2, [2] * 2, **DETECTOR, advantage__scale=2)  # too few seeds, and nobody asks
    found = read_experiment(tmp_path, ["penalty"]).comparisons()
    assert [pair.against for pair in found] == ["vanilla", "untrained base", "penalty_random"]
    assert refused(tmp_path, names=["penalti"]) == [
        "- expected arms of the folder (penalty, penalty_other, penalty_random, vanilla); got penalti"]


def test_runs_that_do_not_say_whether_they_are_controls_are_refused(tmp_path):
    add(tmp_path, "penalty", [1] * 2, [2] * 2, mask_source={"name": "detector"})
    with pytest.raises(ReportError, match="expected mask_source.control in .*config.yaml; there is none. .* run it again"):
        read_experiment(tmp_path)


def test_without_a_method_there_is_nothing_to_compare(tmp_path):
    add(tmp_path, "vanilla", [4], [0])
    assert refused(tmp_path) == ["- expected at least one finished arm that is a method; got vanilla"]


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_table_and_writes_every_number(tmp_path, capsys):
    fill(tmp_path, seeds=6)
    assert main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    said = capsys.readouterr().out
    assert "| `penalty` | vanilla | 6 | -0.75 [-0.94, -0.50] <sub>p=0.031</sub> |" in said
    assert "| `penalty` | control: rate_matched | 6 | -0.50 [" in said and "unmatched (solves more) |" in said
    assert "With 6 seeds no p is below 0.031, before correction" in said
    assert "everything above is exploratory" in said
    assert "| **`penalty`** | 0.25 | 0.50 |" in said and "| `vanilla` | 1.00 | 0.00 |" in said
    assert "| vanilla | hack | 6 | 0.00 | 0.00 | 0.00 |" in said  # seeds that all agree
    lines = records(tmp_path)
    assert tuple(lines[0]) == COLUMNS and len(lines) == 3 * 4
    first = lines[0]
    assert (first["arm_rate"], first["versus_rate"], first["difference"], first["p"]) == ("0.250000", "1.000000", "-0.750000", "0.031250")
    assert np.allclose(list(map(float, first["seed_differences"].split())), -0.75) and first["seeds"] == "0 1 2 3 4 5"


def test_p_values_are_corrected_over_the_arms_of_one_kind(tmp_path, capsys):
    fill(tmp_path, seeds=6)
    add(tmp_path, "inoculation", [2] * 6, [1] * 6, prompt={"name": "inoculation"})
    main([str(tmp_path), "--csv", str(tmp_path / "t.csv")])
    lines = [line for line in records(tmp_path) if line["rate"] == "hack"]
    assert [(line["kind"], line["p_corrected"], line["corrected_over"]) for line in lines] == [
        ("vanilla", "0.062500", "2"), ("base", "0.062500", "2"), ("vanilla", "0.062500", "2"), ("base", "1.000000", "2"),
        ("control", "0.031250", "1")]


def test_the_command_says_why_it_refuses(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "expected an experiment with runs/<run>/" in capsys.readouterr().err
    add(tmp_path, "penalty", [1] * 2, [2] * 2, **DETECTOR)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("not compared:\n- penalty has no control")
    assert "penalty has no vanilla in the folder" in said.err
    assert main([str(tmp_path), "--without-controls"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--solve-within", "0"])
    assert "expected a difference above 0, such as 0.1; got 0" in capsys.readouterr().err


def test_one_seed_has_no_interval(tmp_path, capsys):
    fill(tmp_path, seeds=1)
    assert main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 0
    assert "| `penalty` | vanilla | 1 | -0.75 (one seed) <sub>p=1</sub> |" in capsys.readouterr().out
    assert records(tmp_path)[0]["minimum_detectable"] == "inf"
