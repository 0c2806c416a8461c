"""Tables of a document that a script writes from committed archives, so that no number in it was typed.

    python -m grpo_routing.citations docs/results.md README.md            # writes every block anew
    python -m grpo_routing.citations --check docs/results.md README.md    # exit status 1 when one differs

A block stands between two comments, and everything between them is replaced:

    <!-- rates of docs/data/headline/archive.parquet -->
    <!-- end -->

`rates` is the report's table, `summary` the columns of it that a README wants, `differences` that of compare, `verdicts` the judged
hypotheses, `ablation` and `ablation_verdicts` these two without asking for controls, `sensitivity` what so many seeds find; `folds`,
`sources`, `masks` and `baselines` are the pages of by_fold.py, by_source.py, diagnosis.py and by_baseline.py, `steps` and
`loopholes` parts of the latter; `recall`, `evasion` and `flags` are those of by_recall.py, obfuscation.py and by_answer.py, from CSV that
they wrote: the runs of the first are older than archives, the others read what an archive does not keep.
"""

from __future__ import annotations

import argparse
import atexit
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from grpo_routing import by_answer, by_baseline, by_fold, by_recall, by_source, compare, diagnosis, obfuscation, report
from grpo_routing.analysis import Analysis, analyse
from grpo_routing.archive import unpack
from grpo_routing.arms import Arm, group
from grpo_routing.results import ReportError, Run, read_runs

SUMMARY = ("known", "held-out", "solve", "format")
BLOCK = re.compile(r"<!-- (\w+) of (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


@cache
def unpacked(archive: Path) -> Path:
    """The folder of an archive's experiment, which is there until the process ends. Raises ReportError when it cannot be read."""
    room = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, room)
    experiment = Path(room) / archive.parent.name
    unpack(archive, experiment)
    return experiment


@cache
def runs_of(archive: Path) -> list[Run]:
    return read_runs(unpacked(archive))


def arms_of(archive: Path) -> list[Arm]:
    """In the order of the report, which knows what is a control of what."""
    return group(runs_of(archive))


@cache
def compared(archive: Path, controls: bool = True) -> Analysis:
    """Raises ReportError when the runs cannot be compared; with `controls` False no method is asked for its control."""
    return analyse(unpacked(archive), runs_of(archive), controls=controls)


@cache
def tracks_of(archive: Path) -> list[by_baseline.Track]:
    return by_baseline.tracks_of(unpacked(archive), runs_of(archive))


KINDS: dict[str, Callable[[Path], list[str]]] = {  # of a committed file
    "rates": lambda file: report.markdown_table(arms_of(file)),
    "summary": lambda file: report.markdown_table(arms_of(file), SUMMARY),
    "differences": lambda file: compare.table(compared(file).lines, compared(file).within),
    "verdicts": lambda file: compare.verdicts(compared(file)),
    "sensitivity": lambda file: compare.sensitivity(compared(file).pairs),
    "ablation": lambda file: compare.table(compared(file, False).lines, compared(file, False).within),
    "ablation_verdicts": lambda file: compare.verdicts(compared(file, False)),
    "sources": lambda file: by_source.whole(by_source.finished(runs_of(file))),
    "folds": lambda file: by_fold.page(runs_of(file)),
    "masks": lambda file: diagnosis.page(diagnosis.qualities(unpacked(file), runs_of(file))),
    "baselines": lambda file: by_baseline.whole(tracks_of(file)),
    "steps": lambda file: by_baseline.over_steps(tracks_of(file)),
    "loopholes": lambda file: by_baseline.by_loophole(tracks_of(file)),
    "recall": lambda file: by_recall.page(by_recall.read_table(file)),
    "flags": lambda file: by_answer.page(by_answer.read_table(file)),
    "evasion": lambda file: obfuscation.page(obfuscation.read_table(file, runs_of(file.with_name("archive.parquet"))))}


def written(text: str, root: Path) -> str:
    """The document with every block made anew; archives are named from `root`. Raises ReportError for a block of no known kind."""

    def block(found: re.Match) -> str:
        kind, name, _ = found.groups()
        if kind not in KINDS:
            raise ReportError(f"expected a block of {', '.join(KINDS)}; got {kind!r}")
        return "\n".join([f"<!-- {kind} of {name} -->", *KINDS[kind](root / name), "<!-- end -->"]) + "\n"

    return BLOCK.sub(block, text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.citations", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when a block differs from its archive")
    parser.add_argument("documents", type=Path, nargs="+")
    asked, stale = parser.parse_args(argv), []
    try:
        for document in asked.documents:
            before = document.read_text(encoding="utf-8")
            after = written(before, Path())
            if after != before:
                stale.append(document)
                if not asked.check:
                    document.write_text(after, encoding="utf-8")
    except (ReportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for document in stale:
        print(f"{document}: {'differs from its archives' if asked.check else 'written'}")
    return int(asked.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
