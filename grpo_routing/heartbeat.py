"""A sign of life for whoever watches from outside: heartbeat.json, a few numbers, rewritten every few seconds at most."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

EVERY = 3.0  # seconds; a watcher looks less often than that


class Heartbeat:
    """`beat` may be called every step and costs nothing until EVERY seconds have passed. Not synced to the disk: it is no record."""

    def __init__(self, folder: Path, steps: int, step: int) -> None:
        self.file, self.steps = folder / "heartbeat.json", steps
        self.started, self.first, self.last = time.time(), step, 0.0

    def beat(self, step: int, rates: dict[str, float | None], doing: str) -> None:
        """`step` of `steps` are done; `rates` are what the audit measured last; `doing` is training or evaluating."""
        now = time.time()
        if now - self.last < EVERY and step != self.steps and doing == "training":
            return
        self.last = now
        done = step - self.first
        row = {"time": now, "step": step, "steps": self.steps, "doing": doing,
               "seconds_per_step": (now - self.started) / done if done else None, **rates}
        part = self.file.with_name(f".{self.file.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(row) + "\n", encoding="utf-8")
            part.rename(self.file)
        finally:
            part.unlink(missing_ok=True)
