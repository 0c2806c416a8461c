"""Files that survive a kill: atomic writes, a lock between processes, append-only records that can be cut back."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


def write_atomic(file: Path, data: bytes) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old file or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    part.rename(file)


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
    """An append-only JSONL file with one or more rows per step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, rows: list[dict]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in rows)

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()] if self.file.exists() else []

    def cut(self, step: int) -> None:
        """Keep only whole rows of earlier steps: what a killed run wrote after its last checkpoint is run again."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the kill came in the middle of this line; nothing whole follows it
            if row["step"] < step:
                kept.append(line + "\n")
        write_atomic(self.file, "".join(kept).encode())
