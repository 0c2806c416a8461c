"""The table of arms against recall, and the evaluation of the untrained policy that all its runs share."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from grpo_routing import by_recall
from grpo_routing.run import run


@pytest.fixture(scope="module")
def experiment(config, tmp_path_factory) -> tuple[Path, Path]:
    """Five smoke runs in one folder, with a cache of their own for the untrained policy."""
    output = tmp_path_factory.mktemp("by_recall")
    world = ("loophole=held_out", f"output={output}", f"cache={output / 'cache'}", "experiment_name=e", "evaluation.problems=10")
    for words in (("arm=no_loophole",), ("arm=filter", "mask_source.recall=0.5"), ("arm=filter", "mask_source.recall=0.5", "seed=1"),
                  ("arm=filter", "mask_source.recall=1.0"), ("arm=filter", "mask_source.recall=1.0", "mask_source.control=rate_matched")):
        run(config(*world, *words))
    return output / "e", output / "cache"


def test_arms_stand_against_the_recall_of_their_detector(experiment, tmp_path, capsys):
    assert by_recall.main([str(experiment[0]), "--csv", str(tmp_path / "runs.csv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert by_recall.page(by_recall.read_table(tmp_path / "runs.csv")) == said, "the page again from its lines"
    head, _, base, reference, filtered, control = said
    assert head == "| arm, as deployed | recall 1 | recall 0.5 |"
    assert base.startswith("| *untrained base* | 0.00 / 0.00 / 0.00 |")
    assert reference == "| `no_loophole` | 0.00 / 0.00 / 0.00 | |"
    assert filtered.startswith("| `filter` | 0.00 / 0.00 / 0.00 | 0.00 / 0.00 / 0.00 <sub>") and filtered.endswith("n=2</sub> |")
    assert control == "| `filter control=rate_matched` | 0.00 / 0.00 / 0.00 | – |", "no seed of the arm that it controls"
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [(row["arm"], row["recall"], row["seed"], row["state"]) for row in rows if row["state"] != "as_trained"] == [
        ("filter", "0.5", "0", "base"), ("filter", "0.5", "0", "as_deployed"), ("filter", "0.5", "1", "as_deployed"),
        ("filter", "1.0", "0", "base"), ("filter", "1.0", "0", "as_deployed"),
        ("filter", "1.0", "0", "base"), ("filter", "1.0", "0", "as_deployed"),
        ("no_loophole", "", "0", "base"), ("no_loophole", "", "0", "as_deployed")]
    assert [row["control"] for row in rows if row["state"] == "base"] == ["none", "none", "rate_matched", "none"]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert by_recall.main([str(tmp_path)]) == 2
    assert "expected an experiment with runs/<run>/" in capsys.readouterr().err


def test_the_untrained_policy_is_evaluated_once_for_arms_that_share_it(experiment):
    """One evaluation for the four filters, one for the reference, whose loophole settings differ; and each is the run's own."""
    folder, cache = experiment
    bases = {file.parent.parent.name: file.read_bytes() for file in folder.glob("runs/*/eval/base.json")}
    assert len(bases) == 5 and len(list((cache / "base").glob("*.json"))) == 2
    assert len({value for name, value in bases.items() if name.startswith("filter")}) == 1
    assert all(len(json.loads(value)["rows"]) == 10 for value in bases.values())
