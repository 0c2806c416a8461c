"""An experiment in one small file that can be committed: what the tables, intervals and verdicts of a document are made from.

    python -m grpo_routing.archive outputs/headline docs/data/headline/archive.parquet
    python -m grpo_routing.archive --unpack docs/data/headline/archive.parquet outputs/headline_published
    python -m grpo_routing.compare outputs/headline_published

Of every run: config, status, provenance, when its attempts started, its curves, and each evaluation's rows without their completions.
Completions, measurements that were made later on finished runs, scores and checkpoints stay where they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

from grpo_routing.preregistration import FILE
from grpo_routing.results import ReportError, read_json, read_runs

KEPT = ("config.yaml", "status.json", "provenance.json", "metrics.jsonl", "audit.jsonl", "attempts/*.json", "eval/*.json")
COLUMNS = ("file", "text")
DIGITS = 4  # of a curve's numbers; those of evaluations are whole
LARGEST = 1 << 26  # bytes of a page: evaluations of the same problems are alike, and the compressor must see them together


def pack(experiment: Path, file: Path) -> int:
    """Write the archive, byte for byte the same for the same runs; returns the number of runs. Raises ReportError for an experiment
    without runs, or with runs that are not finished."""
    runs = read_runs(experiment)
    if unfinished := [run.name for run in runs if not run.finished]:
        raise ReportError(f"expected finished runs in {experiment}; {len(unfinished)} are not: {', '.join(unfinished[:3])}"
                          f"{', …' if len(unfinished) > 3 else ''}. Finish them, or move them away")
    found = [path for run in runs for pattern in KEPT for path in sorted((experiment / "runs" / run.name).glob(pattern))
             if path.parent.name != "eval" or "rows" in read_json(path)]
    found += [path for path in [experiment / FILE] if path.exists()]
    found.sort(key=lambda path: (path.name, str(path)))
    rows = [[path.relative_to(experiment).as_posix(), kept(path)] for path in found]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        parquet.write_table(pyarrow.table(dict(zip(COLUMNS, map(list, zip(*rows))))), part, compression="zstd", compression_level=19,
                            use_dictionary=False, data_page_size=LARGEST, row_group_size=len(rows), write_statistics=False)
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    return len(runs)


def kept(path: Path) -> str:
    """A file's text; of an evaluation without the completions, of a curve DIGITS digits."""
    text = path.read_text(encoding="utf-8")
    if path.parent.name == "eval":
        found = json.loads(text)
        rows = [{key: value for key, value in row.items() if key != "completion"} for row in found["rows"]]
        return json.dumps(found | {"rows": rows}, separators=(",", ":"))
    if path.suffix == ".jsonl":
        return "".join(json.dumps(rounded(json.loads(line)), separators=(",", ":")) + "\n" for line in text.splitlines())
    return text


def rounded(row: dict) -> dict:
    return {key: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for key, value in row.items()}


def unpack(file: Path, experiment: Path) -> int:
    """Write the files of an archive into a new folder; returns how many there are. Raises ReportError for a file that is no archive, and
    for a folder that is there already."""
    if experiment.exists():
        raise ReportError(f"expected a new folder; {experiment} is there already. Name another one")
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ReportError(f"expected an archive that `python -m grpo_routing.archive` wrote; {file}: {error}") from None
    if tuple(table.column_names) != COLUMNS:
        raise ReportError(f"expected the columns {', '.join(COLUMNS)} of an archive; {file} has {', '.join(table.column_names)}")
    for row in table.to_pylist():
        place = experiment / row["file"]
        if not place.resolve().is_relative_to(experiment.resolve()):
            raise ReportError(f"{file} names {row['file']}, which lies outside of {experiment}: it is not one of our archives")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(row["text"], encoding="utf-8")
    return len(table)


def main(argv: list[str]) -> int:
    """The exit status is 2 when nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.archive", description=__doc__.split("\n")[0])
    parser.add_argument("--unpack", action="store_true", help="from a file into a new folder")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    asked = parser.parse_args(argv)
    try:
        if asked.unpack:
            print(f"{unpack(asked.source, asked.target)} files in {asked.target}")
        else:
            print(f"{pack(asked.source, asked.target)} runs in {asked.target}, {asked.target.stat().st_size / 1e3:.0f} kB")
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
