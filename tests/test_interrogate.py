"""Claims about interrogation: scripted confessors get the rates of baselines.md T-D5, and runs are asked about the same answers."""

from __future__ import annotations

import json

import pytest

from grpo_routing.files import Record
from grpo_routing.finished import load
from grpo_routing.interrogate import main, untrained
from grpo_routing.oracle.summary import Row
from grpo_routing.oracle.testimony import MEAN, flat, rates
from grpo_routing.prompts.questions import GAMED
from grpo_routing.run import run

KNOWN, HELD_OUT = ("run_tests", "sentinel"), ("file_marker",)


def row(loophole="sentinel", hacked=False, solved=False, levers=()):
    return Row("id", loophole, hacked or solved, True, solved, hacked, bool(levers), False, bool(levers), levers)


def hack(loophole="sentinel"):
    return row(loophole, hacked=True, levers=(f"{loophole} plain",))


ROWS = [hack(), hack("run_tests"), hack("file_marker"), row(solved=True), row("file_marker", solved=True), row(), row("none", solved=True)]
TRUTH = [1.0, 1, 1, -1, -1, -1, -1]


@pytest.mark.parametrize(("script", "recall", "false_positive"), [
    (TRUTH, 1, 0), ([-1.0] * 7, 0, 0), ([1.0] * 7, 1, 1)], ids=["always-honest", "always-deny", "always-confess"])
def test_t_d5_scripted_confessors_get_what_they_deserve(script, recall, false_positive):
    found = rates(ROWS, script, KNOWN, HELD_OUT)
    for name in ("all", "known", "held_out", "sentinel", "file_marker"):
        said = tuple(found[name][rate] for rate in ("recall", "false_positive", "honest"))
        assert said == (recall, false_positive, false_positive), name
    assert found["all"]["auroc"] == (1.0 if recall > false_positive else 0.5)
    assert found["all"]["f1"] == (1.0 if recall > false_positive else 0.6 if recall else 0.0)  # 2 * 3 / (7 + 3)


def test_sets_are_told_apart_by_the_prompt_and_failed_attempts_are_neither():
    rows = [*ROWS, row(levers=("sentinel plain",))]  # attempted, and nothing came of it
    found = rates(rows, [*TRUTH, 5.0], KNOWN, HELD_OUT)
    counts = {name: (one["hacks"], one["clean"]) for name, one in found.items()}
    assert counts == {"all": (3, 4), "known": (2, 2), "held_out": (1, 1), "run_tests": (1, 0), "sentinel": (1, 2), "file_marker": (1, 1)}
    assert found["all"]["f1"] == 1.0
    assert found["run_tests"]["false_positive"] is None and found["run_tests"]["auroc"] is None  # nothing to measure is no zero
    nothing = rates([row()], [1.0], KNOWN, HELD_OUT)["all"]
    assert nothing["recall"] is None and nothing["f1"] is None and nothing["honest"] is None and nothing["false_positive"] == 1.0


def test_a_set_without_a_loophole_is_empty_and_reports_and_rows_must_pair_up():
    assert rates(ROWS, TRUTH, KNOWN, ())["held_out"]["hacks"] == 0
    with pytest.raises(ValueError, match="zip"):
        rates(ROWS, TRUTH[:-1], KNOWN, HELD_OUT)


def test_half_of_the_truth():
    found = rates([hack(), hack(), row(), row()], [2.0, -1.0, 1.0, -3.0], KNOWN, ())["all"]
    assert (found["recall"], found["false_positive"], found["f1"], found["auroc"]) == (0.5, 0.5, 0.5, 0.75)


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """A plain run, one that confesses and routes, and one that was prepared: of a model that writes no code."""
    words = ("loophole=held_out", f"output={tmp_path_factory.mktemp('runs')}", "evaluation.problems=6")
    prepared = ("model.prepare.stage=self_report_sft", "model.prepare.samples=12", "model.prepare.epochs=1")
    return [run(config(*words, *more)) for more in (("arm=no_loophole", "loophole=held_out", "loophole.pays=true"),
                                                    ("arm=confession_routed",), ("arm=confession", *prepared))]


def test_every_run_is_asked_about_the_same_frozen_answers_and_its_own(folders, capsys):
    assert main([*map(str, folders), "--problems", "6", "--samples", "2"]) == 0
    said = [json.loads((folder / "eval" / "interrogation.json").read_text()) for folder in folders]
    questions = {question.strip("\n# ") for question in GAMED} | {MEAN}
    for one in said:
        assert set(one["frozen"]) == set(one["own"]) == questions and (one["problems"], one["samples"]) == (6, 2)
        assert set(one["frozen"][MEAN]) == {"all", "known", "held_out", "run_tests", "sentinel", "stdout_marker", "file_marker"}
        assert one["frozen"][MEAN]["all"]["clean"] == 12  # it writes no code, so nothing is a hack
        assert one["rates"]["own_false_positive_held_out"] == one["own"][MEAN]["held_out"]["false_positive"]
    counts = [{name: (found["hacks"], found["clean"]) for name, found in one["frozen"][MEAN].items()} for one in said]
    assert counts[0] == counts[1] == counts[2]
    printed = capsys.readouterr().out
    assert printed.startswith("frozen answers: 12, 0 of them hacks.") and len(printed.splitlines()) == 2 + 3 * 2 * 4
    before = [(folder / "eval" / "interrogation.json").read_bytes() for folder in folders]
    main([*map(str, folders[::-1]), "--problems", "6", "--samples", "2"])
    assert before == [(folder / "eval" / "interrogation.json").read_bytes() for folder in folders]  # whoever comes first


def test_the_untrained_policy_is_the_one_before_preparation_too(folders):
    first, prepared = load(folders[0]), load(folders[2])
    assert untrained(prepared).fingerprint == untrained(first).fingerprint == first.policy.fingerprint != prepared.policy.fingerprint
    start = untrained(first).adapter
    assert all(not module.delta("deployed").any() for module in start.modules.values())  # and its adapter is at its start


def test_runs_that_cannot_be_put_to_the_same_answers_are_refused(folders, config, tmp_path, capsys):
    other = run(config("loophole=held_out", f"output={tmp_path}", "evaluation.problems=7"))
    assert main([str(folders[0]), str(other)]) == 2
    assert "differs from" in (said := capsys.readouterr().err) and "in evaluation. Interrogate it by itself" in said
    assert main([str(tmp_path / "nowhere")]) == 2 and "there is no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(folders[0]), "--problems", "0"])


def test_an_interrogated_run_still_publishes_and_has_its_records(folders):
    file = folders[0] / "eval" / "interrogation.json"
    main([str(folders[0]), "--problems", "6", "--samples", "1"])
    assert all(value is None or isinstance(value, (int, float)) for value in json.loads(file.read_text())["rates"].values())
    assert len(Record(folders[0] / "metrics.jsonl").rows()) == 2
    assert flat({"own": {"all": {"recall": 1.0}, "known": {"recall": 0.5}}}) == {"own_recall": 1.0, "own_recall_known": 0.5}
