"""`python -m grpo_routing …` in a process of its own that starts warm: forked by a server that has loaded the libraries once.

Loading torch and transformers takes longer than the runs that tests make, and a test that kills runs starts three.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["grpo_routing.run", "hydra", "transformers.models.qwen3.modeling_qwen3", "tests.warm"])


class Entry:
    """A started `python -m grpo_routing`."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        self.process = CONTEXT.Process(target=_enter, args=(words, str(log)))
        self.process.start()

    @property
    def said(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 300) -> int:
        """Its exit status; minus the signal where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.said}"
        return self.process.exitcode

    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _enter(words: list[str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["grpo_routing", *words]
    runpy.run_module("grpo_routing", run_name="__main__", alter_sys=True)
