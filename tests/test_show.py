"""A run in the terminal: its numbers are those of the files, and nothing that a model wrote reaches the terminal as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_routing.show import main, printable, sparkline
from tests.test_report import config, make_run

REWARD = {"format_reward": 0.25, "pass_reward": 1.0}


def rollout(step: int, completion: str, **verdict: object) -> str:
    return json.dumps({"step": step, "source": "student", "loophole": "sentinel", "reward": 1.25, "solved": False, "hacked": True,
                       "completion": completion, "prompt": "negate it"} | verdict) + "\n"


def shown(folder: Path, capsys, *words: str) -> str:
    assert main([str(folder), *words]) == 0
    return capsys.readouterr().out


def test_curves_rates_and_last_samples_are_shown(tmp_path: Path, capsys) -> None:
    folder = make_run(tmp_path, config("vanilla", reward=REWARD), trained={"hack": 0.875, "hack_held_out": None},
                      audit={"hack": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]}, metrics={"train/reward": [1.25] * 6, "train/format": [1.0] * 6})
    (folder / "rollouts.jsonl").write_text(rollout(4, "first") + rollout(5, "second", hacked=False, solved=True, loophole="file_marker"))
    text = shown(folder, capsys, "--samples", "1")
    lines = [line.split() for line in text.splitlines()]
    assert ["done,", "6", "of", "6", "steps,", "commit", "0123456789"] in lines
    assert ["reward", "1.25", "██████", "1.25"] in lines
    assert ["hack", "0.00", "▁▅▆▇▇█", "1.00"] in lines, "each value is the mean over up to five steps"
    assert ["as", "trained", "0.88", "0.50", "–", "0.50", "0.50"] in lines
    assert "step 6, seed 0, file_marker, held out: negate it" in text and "second" in text and "first" not in text
    assert "environment: passed (reward 1.25)" in text and "truth: solved" in text


def test_a_failed_run_says_why_and_needs_no_evaluation(tmp_path: Path, capsys) -> None:
    status = {"state": "failed", "error": "ValueError: [red]loss[/red]"}
    folder = make_run(tmp_path, config("vanilla", reward=REWARD), status=status, steps=0)
    (folder / "eval" / "base.json").unlink()
    text = shown(folder, capsys)
    assert "failed, 0 of 6 steps" in text and "ValueError: [red]loss[/red]" in text and "evaluated" not in text


def test_completions_cannot_command_the_terminal(tmp_path: Path, capsys) -> None:
    folder = make_run(tmp_path, config("vanilla", reward=REWARD))
    (folder / "rollouts.jsonl").write_text(rollout(5, "a\x1b[2Jb[bold]c\x07", prompt="\x1b]0;owned\x07"))
    text = shown(folder, capsys)
    assert "\x1b" not in text and "\x07" not in text and "a�[2Jb[bold]c�" in text


def test_a_sparkline_fits_its_width_and_marks_what_was_not_measured() -> None:
    assert sparkline([0.0, 0.5, 1.0, None], 10) == "▁▅█·"
    assert sparkline([0.0, 1.0] * 48, 4) == "▅▅▅▅"
    assert sparkline([1.25, 2.5], 9, most=2.5) == "▅█" and sparkline([-1.0, 7.0], 9) == "▁█"
    assert printable("\ttab\nline é") == "\ttab\nline é"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("expected a run folder with config.yaml; got ")
    with pytest.raises(SystemExit):
        main([])
