"""Claims about the table of experiments that leave one loophole out."""

from __future__ import annotations

from pathlib import Path

from grpo_routing import by_fold
from tests.test_compare import DETECTOR, MATCHED
from tests.test_report import config, make_run

BASE = {"hack_known": 0.25, "hack_held_out": 0.125, "solve": 0.5}


def fold(experiment: Path, arm: str, name: str, held_out: list[str], rates: list[tuple[float, float, float]], **more: object) -> None:
    """A run per seed with these rates (known, held-out, solve)."""
    for seed, found in enumerate(rates):
        settings = config(arm, seed, loophole__name=name, loophole__held_out=held_out, **more)
        make_run(experiment, settings, base=BASE, trained=dict(zip(by_fold.SHOWN, found)))


def test_a_column_is_a_fold_and_a_control_stands_under_its_arm(tmp_path, capsys):
    for name, held_out in (("held_out", "file_marker"), ("held_out_sentinel", "sentinel")):
        fold(tmp_path, "vanilla", name, [held_out], [(1.0, 0.75, 0.0), (0.5, 0.25, 0.0)])
        fold(tmp_path, "penalty", name, [held_out], [(0.0, 0.5, 0.25), (0.0, 0.25, 0.75)], **DETECTOR)
    fold(tmp_path, "penalty_random", "held_out", ["file_marker"], [(0.5, 0.5, 0.5)] * 3, **MATCHED)
    assert by_fold.main([str(tmp_path)]) == 0
    vanilla = "0.75 / 0.50 / 0.00 <sub>.50–1.00 / .25–.75 / .00–.00, n=2</sub>"
    penalty = "0.00 / 0.38 / 0.50 <sub>.00–.00 / .25–.50 / .25–.75, n=2</sub>"
    assert capsys.readouterr().out.splitlines() == [
        "| arm, as deployed | file_marker held out | sentinel held out |",
        "|---|---|---|",
        "| *untrained base* | 0.25 / 0.12 / 0.50 | 0.25 / 0.12 / 0.50 |",
        f"| `vanilla` | {vanilla} | {vanilla} |",
        f"| `penalty` | {penalty} | {penalty} |",
        "| `penalty_random` <sub>control: rate_matched</sub> | 0.50 / 0.50 / 0.50 <sub>.50–.50 / .50–.50 / .50–.50, n=3</sub> | – |"]


def test_runs_without_a_fold_or_two_in_one_place_are_refused(tmp_path, capsys):
    fold(tmp_path / "whole", "vanilla", "all", [], [(1.0, 0.75, 0.0)])
    assert by_fold.main([str(tmp_path / "whole")]) == 2
    assert "expected arms with a held-out loophole; vanilla has none (loophole=all)" in capsys.readouterr().err
    for name in ("held_out", "told"):
        fold(tmp_path / "twice", "vanilla", name, ["file_marker"], [(1.0, 0.75, 0.0)])
    assert by_fold.main([str(tmp_path / "twice")]) == 2
    assert "two arms are `vanilla` with file_marker held out: vanilla held_out and vanilla told" in capsys.readouterr().err
    assert by_fold.main([str(tmp_path / "none")]) == 2
