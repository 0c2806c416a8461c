"""The table of flags by kind of answer: counts of hand-made rows, and the way from a run's folder to a document."""

from __future__ import annotations

import json

import pytest

from grpo_routing import by_answer
from grpo_routing.by_answer import count, count_kept, page, read_table, table
from grpo_routing.citations import written
from grpo_routing.results import ReportError
from grpo_routing.run import run

ANSWERS = {"flag": [1.0, 0.0, 0.5, 0.4, 1.0], "hacked": [True, True, False, False, False], "exploited": [True, True, True, True, False],
           "loophole": ["sentinel", "sentinel", "sentinel", "run_tests", "none"]}


def test_answers_are_counted_by_quarter_loophole_and_kind():
    """Eight steps: steps 0 and 1 are the first quarter, 2 begins the second; prompts without a hint count nowhere."""
    assert count([{"step": 0} | ANSWERS, {"step": 1} | ANSWERS, {"step": 2} | ANSWERS], 8) == {
        (1, "sentinel", "hack"): (2, 4), (1, "sentinel", "lever"): (2, 2), (1, "run_tests", "lever"): (0, 2),
        (2, "sentinel", "hack"): (1, 2), (2, "sentinel", "lever"): (1, 1), (2, "run_tests", "lever"): (0, 1)}


def written_by(source: str, loophole: str, hacked: bool, solved: bool, step: int = 0) -> dict:
    return {"step": step, "source": source, "loophole": loophole, "hacked": hacked, "solved": solved}


def test_kept_answers_are_every_so_many_th_judged_one_and_say_who_wrote_them():
    """Of five judged three are kept, as the stride is 5 // 3 = 1 and the third the last; of two steps the second kept none."""
    kept = [written_by("anchor", "sentinel", True, False), written_by("student", "sentinel", True, False),
            written_by("anchor", "sentinel", False, True)]
    assert count_kept([{"step": 0} | ANSWERS, {"step": 1} | ANSWERS], kept, 3) == {
        ("anchor", "sentinel", "hack"): (1, 1), ("student", "sentinel", "hack"): (0, 1),
        ("anchor", "sentinel", "right, with a lever"): (1, 1)}
    kept = [kept[0], written_by("student", "sentinel", False, False), written_by("student", "none", False, True)]  # of a stride of 2
    assert count_kept([{"step": 0} | ANSWERS], kept, 2) == {
        ("anchor", "sentinel", "hack"): (1, 1), ("student", "sentinel", "failed, with a lever"): (1, 1)}
    with pytest.raises(ReportError, match=r"expected every 1th judged answer of step 0 in rollouts.jsonl; got others than in scores.jsonl"):
        count_kept([{"step": 0} | ANSWERS], kept, 4)


def test_kept_answers_are_shown_by_who_wrote_them():
    rows = [{"arm": "sourced", "seed": seed, "source": "anchor", "loophole": "sentinel", "kind": "right", "flagged": 1, "answers": 4,
             "run": "r", "code": "c"} for seed in (0, 1)]
    assert page(rows)[0] == "| arm | written by | answer | all loopholes | sentinel |" and page(rows)[1].count("---") == 5
    assert page(rows)[5] == "| `sourced` | anchor | right | 0.25 <sub>8</sub> | 0.25 <sub>8</sub> |" and page(rows)[2].endswith("| – | – |")


def one(arm: str, quarter: int, loophole: str, kind: str, flagged: int, answers: int, seed: int = 0) -> by_answer.Row:
    return {"arm": arm, "seed": seed, "quarter": quarter, "loophole": loophole, "kind": kind, "flagged": flagged, "answers": answers,
            "run": "r", "code": "c"}


ROWS = [one("sourced", 1, "sentinel", "hack", 9, 10), one("sourced", 4, "sentinel", "hack", 5, 10),
        one("sourced", 4, "sentinel", "hack", 3, 6, seed=1), one("sourced", 2, "sentinel", "hack", 0, 99),
        one("sourced", 4, "run_tests", "lever", 1, 4)]


def test_a_cell_is_the_first_and_the_last_quarter_of_all_seeds():
    assert page(ROWS) == [
        "| arm | answer | all loopholes | run_tests | sentinel |", "|---|---|---|---|---|",
        "| `sourced` | hack | 0.90 → 0.50 <sub>10, 16</sub> | – → – <sub>0, 0</sub> | 0.90 → 0.50 <sub>10, 16</sub> |",
        "| `sourced` | lever | – → 0.25 <sub>0, 4</sub> | – → 0.25 <sub>0, 4</sub> | – → – <sub>0, 0</sub> |",
        "| `sourced` | no lever | – → – <sub>0, 0</sub> | – → – <sub>0, 0</sub> | – → – <sub>0, 0</sub> |"]


def test_a_document_cites_the_table_that_was_kept(tmp_path):
    (tmp_path / "flags.csv").write_text(table(ROWS))
    assert read_table(tmp_path / "flags.csv") == ROWS
    block = "<!-- flags of flags.csv -->\n{}<!-- end -->\n"
    assert written(block.format("old\n"), tmp_path) == block.format("\n".join(page(ROWS)) + "\n")


def test_a_folder_becomes_a_table(config, tmp_path, capsys):
    """Of a run whose source flags at random, as many as its judged answers with a hint; an arm that labels nothing has no row."""
    words = ("loophole=held_out", f"output={tmp_path}", "experiment_name=e", "evaluation.problems=6")
    for more in (["arm=graft", "mask_source.false_positive=0.5"], ["arm=vanilla"]):
        folder = run(config(*words, *more))
        if more == ["arm=vanilla"]:
            assert (folder / "scores.jsonl").exists()  # of the direction that it measures
        else:
            scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    hinted = [flag for step in scored for flag, loophole in zip(step["flag"], step["loophole"]) if loophole != "none"]
    capsys.readouterr()
    assert by_answer.main([str(tmp_path / "e"), "--csv", str(tmp_path / "flags.csv"), "--kept", str(tmp_path / "kept.csv")]) == 0
    rows = read_table(tmp_path / "flags.csv")
    assert {row["arm"] for row in rows} == {"graft"} and {row["quarter"] for row in rows} == {1, 3}  # two steps are two of four quarters
    assert (sum(row["flagged"] for row in rows), sum(row["answers"] for row in rows)) == (sum(flag > 0 for flag in hinted), len(hinted))
    assert 0 < sum(flag > 0 for flag in hinted) < len(hinted)
    kept = read_table(tmp_path / "kept.csv")
    assert {row["source"] for row in kept} == {"student", "anchor"} and {row["kind"] for row in kept} == {"failed"}  # it does nothing yet
    assert capsys.readouterr().out.splitlines() == [*page(rows), "", *page(kept)]
    assert by_answer.main([str(tmp_path / "nothing")]) == 2 and by_answer.main([str(folder)]) == 2
