"""Files that survive a kill: atomic writes, a lock between processes, append-only records that can be cut back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


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


class Held(RuntimeError):
    """Another process works on the same folder. Exit code 75 of a worker: come back later, nothing is wrong."""


@contextmanager
def claimed(file: Path, patience: float | None) -> Iterator[None]:
    """Hold `file` and say in it who does: host, process, SLURM job. Waits `patience` seconds (None: for ever), then raises Held.

    The lock is the kernel's (flock), so on one machine a dead owner is no owner. Between machines it holds where the file system
    passes locks on (NFS with its lock daemon, Lustre with -o flock); where it does not, every machine would be given the lock.
    Therefore what the file says counts as well: an owner whose SLURM job still runs under another number keeps it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as handle:
        _wait_for(handle, file, patience)
        handle.truncate(0)
        handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"),
                                 "since": time.time()}))
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


def _wait_for(handle: TextIO, file: Path, patience: float | None) -> None:
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            there = True
        else:
            there = works_elsewhere(owner_of(file))
            if not there:
                return
            fcntl.flock(handle, fcntl.LOCK_UN)
        if patience is not None and time.monotonic() - start > patience:
            owner = owner_of(file) or {"host": "a machine that did not say which", "pid": "?", "job": None}
            job = f" (SLURM job {owner['job']})" if owner["job"] else ""
            raise Held(f"{file.parent} is being worked on by process {owner['pid']} on {owner['host']}{job}; the same run never runs "
                       f"twice at once. Wait for it, or end it")
        time.sleep(0.2)


def owner_of(file: Path) -> dict | None:
    """Who wrote the lock file last and did not let go; None when nobody did."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # emptied, or being written
        return None


def works_elsewhere(owner: dict | None) -> bool:
    """Whether the owner's SLURM job still runs, and is not the life of this very job before it was requeued."""
    if owner is None or owner["job"] in (None, os.environ.get("SLURM_JOB_ID")) or not shutil.which("squeue"):
        return False
    if owner["host"] == socket.gethostname():
        return False  # the kernel gave us the lock, so that process is gone
    said = subprocess.run(["squeue", "-h", "-t", "RUNNING,COMPLETING,SUSPENDED", "-j", str(owner["job"]), "-o", "%i"],
                          capture_output=True, text=True)
    return said.returncode == 0 and bool(said.stdout.strip())


class Record:
    """An append-only JSONL file with one or more rows per step. A kill can tear only its last line, which then has no
    end; such a line does not count. A process that does not write (`writes` false) may read."""

    def __init__(self, file: Path, writes: bool = True) -> None:
        self.file, self.writes = file, writes

    def append(self, rows: list[dict]) -> None:
        if not self.writes:
            return
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
