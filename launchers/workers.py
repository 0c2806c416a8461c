"""The processes that compute one run: one, or one per GPU, which meet on this machine's loopback (grpo_routing/parallel.py).

They write into one pipe. When one fails, the others hear it from each other and end by themselves; what is left after GRACE is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time

GRACE = 60.0  # seconds
_PR_SET_PDEATHSIG = 1


class Workers:
    def __init__(self, command: list[str], cwd: str, environment: dict[str, str], count: int) -> None:
        """Start `count` of them."""
        reading, writing = os.pipe()
        places = [{}] if count == 1 else meeting(count)
        self.processes = [subprocess.Popen(command, cwd=cwd, env=environment | place, stdout=writing, stderr=subprocess.STDOUT,
                                           preexec_fn=_die_with_parent) for place in places]
        os.close(writing)
        self.output = os.fdopen(reading, "rb")  # ends when all have ended
        self.failed: tuple[int, float] | None = None  # exit code and time of the first that did not end well

    def pass_on(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def tend(self) -> None:
        """To be called now and then: notices an end, and kills those that go on too long after a failed one."""
        codes = [process.poll() for process in self.processes]
        bad = [code for code in codes if code]
        if bad and self.failed is None:
            self.failed = min(bad), time.monotonic()  # seen together: one that a signal ended, which Popen counts below zero
        if self.failed and None in codes and time.monotonic() - self.failed[1] > GRACE:
            self.pass_on(signal.SIGKILL)

    def wait(self) -> int:
        """The exit code of the run once all have ended: of the first that failed, so that its cause is not another's echo."""
        for process in self.processes:
            process.wait()
        self.tend()
        code = self.failed[0] if self.failed else 0
        return 128 - code if code < 0 else code


def meeting(count: int) -> list[dict[str, str]]:
    """What each of several processes is told, in torchrun's words."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in range(count)]


def _die_with_parent() -> None:
    """A worker never outlives its runner, so a run whose runner is gone is free. Loaded before the fork: no import in between."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_libc = ctypes.CDLL(None)
