"""Files that survive a kill: atomic writes, a lock between processes, append-only records that can be cut back."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(file: Path, data: bytes) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old file or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, value: object) -> None:
    write_atomic(file, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the kernel lets go of it when the process dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class Record:
    """An append-only JSONL file with one or more rows per step. A kill can tear only its last line, which then has no
    end; such a line does not count."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, rows: list[dict]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)

    def rows(self) -> list[dict]:
        """Every whole row. Raises ValueError with file and line for one that is not JSON."""
        if not self.file.exists():
            return []
        *whole, _torn = self.file.read_text(encoding="utf-8").split("\n")
        return [self._row(number, line) for number, line in enumerate(whole, 1)]

    def _row(self, number: int, line: str) -> dict:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.file}:{number}: expected a row of JSON; got {line[:60]!r}; mend or remove it") from error

    def cut(self, step: int) -> None:
        """Keep only whole rows of earlier steps: what a killed run wrote after its last checkpoint is run again."""
        if self.file.exists():
            write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] < step).encode())
