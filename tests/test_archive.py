"""An archive gives the same comparison as the runs that it was made from, and a document's tables are those of its archives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from grpo_routing import archive, citations
from grpo_routing.analysis import analyse
from grpo_routing.archive import pack, unpack
from grpo_routing.citations import written
from grpo_routing.compare import body
from grpo_routing.preregistration import register
from grpo_routing.report import load
from grpo_routing.results import ReportError, read_runs
from tests.conftest import CONF
from tests.test_compare import add, fill
from tests.test_preregistration import CLAIM, sweep

ROOT = CONF.parent


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    root.mkdir()
    register([CLAIM | {"matched_solve_within": None}], sweep(root), "none")
    fill(root, seeds=6)
    for file in root.glob("runs/*/eval/*.json"):
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {"rows": [row | {"completion": "x" * 99} for row in found["rows"]]}))
        (file.parent / "obfuscation.json").write_text('{"scores": "xxx"}')  # as a later measurement leaves it
    return root


def test_an_archive_is_compared_and_judged_like_its_runs(experiment: Path, tmp_path: Path) -> None:
    assert pack(experiment, tmp_path / "a.parquet") == 18
    unpack(tmp_path / "a.parquet", tmp_path / "else" / "tiny")
    before, after = (body(analyse(root, read_runs(root))) for root in (experiment, tmp_path / "else" / "tiny"))
    assert after == before and any("**confirmed**" in line for line in after)
    assert load(tmp_path / "else" / "tiny") == load(experiment)
    left = list((tmp_path / "else").rglob("*.json"))
    assert left and not any("xxx" in file.read_text() for file in left), "completions and later measurements stay where they are"


def test_the_same_runs_give_the_same_bytes(experiment: Path, tmp_path: Path) -> None:
    for name in "ab":
        pack(experiment, tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_curves_keep_four_digits_and_whole_numbers() -> None:
    row = {"step": 123456, "a": 0.123456, "b": None, "c": 98765.4}
    assert archive.rounded(row) == row | {"a": 0.1235, "c": 98770.0}


def test_what_is_not_finished_is_not_archived(experiment: Path, tmp_path: Path) -> None:
    add(experiment, "erase", [1], [1], status={"state": "running"})
    with pytest.raises(ReportError, match="expected finished runs in .*; 1 are not: erase-held_out-s0. Finish them, or move them away"):
        pack(experiment, tmp_path / "a.parquet")
    assert list(tmp_path.glob("*.part")) == [] and not (tmp_path / "a.parquet").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"file": ["../../etc/x"], "text": [""]}), tmp_path / "evil.parquet")
    for name, why in (("text", "expected an archive that"), ("other", "expected the columns file, text"), ("evil", "lies outside of")):
        with pytest.raises(ReportError, match=why):
            unpack(tmp_path / f"{name}.parquet", tmp_path / name)
    with pytest.raises(ReportError, match="is there already"):
        unpack(tmp_path / "evil.parquet", tmp_path)


def test_a_block_is_written_from_its_archive_and_nothing_else_changes(experiment: Path, tmp_path: Path) -> None:
    pack(experiment, tmp_path / "tiny" / "archive.parquet")
    kinds = ("rates", "summary", "differences", "verdicts", "sensitivity")
    text = "".join(f"before\n<!-- {kind} of tiny/archive.parquet -->\nstale\n<!-- end -->\nafter\n" for kind in kinds)
    made = written(text, tmp_path)
    assert "stale" not in made and made.count("before\n") == made.count("after\n") == len(kinds)
    assert written(made, tmp_path) == made
    lines = body(analyse(experiment, read_runs(experiment)))
    for kind in ("differences", "verdicts", "sensitivity"):
        block = re.search(rf"<!-- {kind} of \S+ -->\n(.*?)\n<!-- end -->", made, re.DOTALL).group(1)
        assert block in "\n".join(lines), kind
    assert "| penalty |" in made.split("<!-- rates")[1].split("<!-- end -->")[0]


def test_an_unknown_block_and_a_missing_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="expected a block of rates, summary, .*, loopholes, recall, flags, evasion; got 'means'"):
        written("<!-- means of a.parquet -->\n<!-- end -->\n", tmp_path)
    with pytest.raises(ReportError, match="expected an archive"):
        written("<!-- rates of a.parquet -->\n<!-- end -->\n", tmp_path)


def test_check_says_what_is_stale(experiment: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    pack(experiment, Path("tiny/archive.parquet"))
    Path("doc.md").write_text("<!-- rates of tiny/archive.parquet -->\n<!-- end -->\n")
    assert citations.main(["--check", "doc.md"]) == 1 and "doc.md: differs from its archives" in capsys.readouterr().out
    assert citations.main(["doc.md"]) == 0 and citations.main(["--check", "doc.md"]) == 0
    assert archive.main(["nowhere", "a.parquet"]) == 2


@pytest.mark.parametrize("document", ["docs/results.md", "README.md", "docs/log.md"])
def test_the_tables_of_the_documents_are_those_of_their_archives(document: str) -> None:
    """Every table of results, back to the single runs that its archive or CSV names."""
    text = (ROOT / document).read_text()
    assert citations.BLOCK.search(text), f"{document} cites no archive"
    assert written(text, ROOT) == text, f"run python -m grpo_routing.citations {document}"
