"""Tables of a document that a script writes from committed archives, so that no number in it was typed.

    python -m grpo_routing.citations docs/results.md README.md            # writes every block anew
    python -m grpo_routing.citations --check docs/results.md README.md    # exit status 1 when one differs

A block stands between two comments, and everything between them is replaced:

    <!-- rates of docs/data/headline/archive.parquet -->
    <!-- end -->

`rates` is the report's table, `summary` the columns of it that a README wants, `differences` that of compare, `verdicts` the judged
hypotheses, `sensitivity` what so many seeds find.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from grpo_routing import compare, report
from grpo_routing.analysis import Analysis, analyse
from grpo_routing.archive import unpack
from grpo_routing.arms import Arm, group
from grpo_routing.results import ReportError, read_runs

SUMMARY = ("known", "held-out", "solve", "format")
BLOCK = re.compile(r"<!-- (\w+) of (\S+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
KINDS: dict[str, Callable[[Analysis], list[str]]] = {
    "rates": lambda found: report.markdown_table(arms_of(found)),
    "summary": lambda found: report.markdown_table(arms_of(found), SUMMARY),
    "differences": lambda found: compare.table(found.lines, found.within),
    "verdicts": compare.verdicts,
    "sensitivity": lambda found: compare.sensitivity(found.pairs)}


def arms_of(found: Analysis) -> list[Arm]:
    """In the order of the report, which knows what is a control of what."""
    return group([run for arm in found.experiment.arms for run in arm.runs])


@cache
def of_archive(archive: Path) -> Analysis:
    """Raises ReportError when the archive cannot be read or its runs cannot be compared."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(archive, experiment := Path(folder) / archive.parent.name)
        return analyse(experiment, read_runs(experiment))


def written(text: str, root: Path) -> str:
    """The document with every block made anew; archives are named from `root`. Raises ReportError for a block of no known kind."""

    def block(found: re.Match) -> str:
        kind, name, _ = found.groups()
        if kind not in KINDS:
            raise ReportError(f"expected a block of {', '.join(KINDS)}; got {kind!r}")
        return "\n".join([f"<!-- {kind} of {name} -->", *KINDS[kind](of_archive(root / name)), "<!-- end -->"]) + "\n"

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
