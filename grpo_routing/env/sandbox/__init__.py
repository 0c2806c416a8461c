"""Run untrusted programs, and believe only what can be checked.

    with Sandbox(workers=2, wall_seconds=3.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        outcome = box.run(Submission(code, method="add", calls=((1, 2), (3, 4))))
        right = all(one.kind == "value" and same(one.value, expected) for one, expected in ...)

    this process --> zygote (warm, single-threaded, knows nothing) --fork--> child: one submission
                     one per worker                                          confined by the kernel

Inputs go in, outputs come back as plain data, and the caller compares: no expected value is ever in
the child. A child has its own session, limits (CPU, memory, output, files), no environment, and - under
seccomp - no way to open a file or a socket, to start a thread or process, or to signal anyone.

What stays open: the program runs in the process of the code that drives it (`driver.py`), so it can
write its own result, if it digs the nonce out of the driver's frames. Return values gain nothing by it.
The two claims `function_returned` and `attribute_true` could be forged, though only by a program whose
text, parsed before it ran, names that function or attribute - and such a program could as well have
defined it. Kernel bugs and side channels are not defended against.
"""

import os
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence

from grpo_routing.env.sandbox import confine, evidence
from grpo_routing.env.sandbox.evidence import Evidence
from grpo_routing.env.sandbox.nouns import Outcome, Return, SandboxError, SandboxUnavailable, Submission
from grpo_routing.env.sandbox.plain import same
from grpo_routing.env.sandbox.server import Server

__all__ = ["Outcome", "Return", "Sandbox", "SandboxError", "SandboxUnavailable", "Submission", "same"]

_MINIMA = ("landlock", "seccomp", "unsafe")
_NOBODY = 65534
_PATIENCE = 30.0  # seconds that a zygote may be late with the report on a child whose time is over


class Sandbox:
    """A few warm fork servers. A context manager; also starts itself at the first use."""

    def __init__(
        self,
        workers: int,
        wall_seconds: float,
        cpu_seconds: int,
        memory_mb: int,
        minimum: str,
        *,
        _offered: confine.Offer | None = None,
    ):
        """minimum: "landlock" (with seccomp), "seccomp", or "unsafe" (resource limits only); the strongest
        that the kernel offers is used. Raises SandboxUnavailable if that is less than the minimum.
        _offered: for tests, pretend that the kernel offers no more than this."""
        if minimum not in _MINIMA:
            raise ValueError(f"minimum is one of {', '.join(_MINIMA)}; got {minimum!r}.")
        if workers < 1 or wall_seconds <= 0 or cpu_seconds < 1 or memory_mb < 64:
            raise ValueError(
                "expected workers >= 1, wall_seconds > 0, cpu_seconds >= 1, memory_mb >= 64; got "
                f"{workers}, {wall_seconds}, {cpu_seconds}, {memory_mb}."
            )
        self._offer = confine.offered() if _offered is None else _offered
        _require(self._offer, minimum)
        self._workers, self._wall_seconds, self._cpu_seconds = workers, wall_seconds, cpu_seconds
        self._memory_bytes = memory_mb * 1024 * 1024
        self._servers: list[Server] = []
        self._root: str | None = None
        self._owner: int | None = None  # pid of the process that may use the servers
        self._closed: str | None = None  # why
        self._lock = threading.RLock()

    # --- life ---

    def __enter__(self) -> "Sandbox":
        with self._lock:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._closed is not None:
            raise SandboxError(f"this sandbox is closed ({self._closed}). Make a new one.")
        if self._owner not in (None, os.getpid()):
            raise SandboxError(
                f"this sandbox belongs to process {self._owner}, not to its fork {os.getpid()}. "
                "Make the sandbox in the process that uses it."
            )
        if self._servers:
            return
        self._owner = os.getpid()
        settings = {
            "wall_seconds": self._wall_seconds,
            "cpu_seconds": self._cpu_seconds,
            "memory_bytes": self._memory_bytes,
            "output_bytes": evidence.OUTPUT_BYTES,
            "seccomp": self._offer.seccomp,
            "landlock": self._offer.landlock,
        }
        try:
            for _ in range(self._workers):
                self._servers.append(Server(settings))
            if self._offer.landlock is not None:
                self._root = tempfile.mkdtemp(prefix="grpo-sandbox-")
                os.chmod(self._root, 0o711)  # a child under another uid may pass to its own directory
            self._prove()
        except BaseException:
            self.close("it did not start")
            raise

    def _prove(self) -> None:
        """Believe the layers only after a submission has run into them."""
        outcome = self.run(Submission(_PROBE, "probe", ((),)))
        refused = Return("value", ["refused", "refused"])
        if self._offer.seccomp and outcome.returns != (refused,):
            raise SandboxError(
                f"the sandbox does not hold: expected {refused} from a program that opens a file and a "
                f"socket, got {outcome}. Do not train with it; report the kernel and Python version."
            )

    def close(self, why: str = "close was called") -> None:
        """End every server and remove what was made. Harmless when repeated."""
        with self._lock:
            self._closed = self._closed or why
            self._end_servers()
            if self._root is not None:
                shutil.rmtree(self._root)
                self._root = None

    def _end_servers(self) -> None:
        while self._servers:
            self._servers.pop().close()

    @property
    def workers(self) -> int:
        """How many submissions run at a time."""
        return self._workers

    @property
    def layers(self) -> dict:
        """What is active, for the record of a run."""
        with self._lock:
            self._start()
            uid_drop = self._servers[0].hello["uid_drop"]
        active = {"seccomp": self._offer.seccomp, "landlock": self._offer.landlock, "uid_drop": uid_drop}
        parts = [
            "seccomp" if self._offer.seccomp else "NO seccomp",
            f"landlock {self._offer.landlock}" if self._offer.landlock else "no landlock",
            "uid nobody" if uid_drop else "own uid",
            "rlimits, own session, no environment",
        ]
        return active | {"description": ", ".join(parts)}

    # --- work ---

    def run(self, submission: Submission) -> Outcome:
        return self.run_many([submission])[0]

    def run_many(self, submissions: Sequence[Submission]) -> list[Outcome]:
        """Outcomes in the order of `submissions`, all workers in flight. Raises SandboxError only for
        failures of ours; after one, or an interruption, the sandbox is closed."""
        with self._lock:
            self._start()
            pending: dict[int, Evidence] = {}
            try:
                return self._run_many(submissions, pending)
            except BaseException:
                self._end_servers()  # and with them the children, so that their directories hold still
                for left in pending.values():
                    left.close()
                self.close("an earlier run failed")
                raise

    def _run_many(self, submissions: Sequence[Submission], pending: dict[int, Evidence]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(submissions)
        waiting = iter(range(len(submissions)))
        busy: dict[int, tuple[Server, int, float]] = {}  # descriptor -> server, index, latest report
        poller = select.poll()

        def give(server: Server) -> None:
            index = next(waiting, None)
            if index is None:
                poller.unregister(server)
                busy.pop(server.fileno())
                return
            pending[index] = Evidence(submissions[index], self._root, self._child_uid())
            latest = time.monotonic() + self._wall_seconds + _PATIENCE
            busy[server.fileno()] = (server, index, latest)
            server.send(pending[index].job, pending[index].descriptors)

        for server in self._servers:
            poller.register(server, select.POLLIN)
            busy[server.fileno()] = (server, -1, 0.0)
            give(server)
        while busy:
            patience = min(latest for _, _, latest in busy.values()) - time.monotonic()
            ready = poller.poll(max(patience, 0) * 1000)
            if not ready:
                raise SandboxError(
                    f"a fork server did not report within {_PATIENCE:.0f} s of the time limit."
                )
            for descriptor, _ in ready:
                server, index, _ = busy[descriptor]
                report = server.receive()
                give(server)  # the server works on the next one while we read this one
                done = pending.pop(index)
                try:
                    outcomes[index] = done.outcome(report, self._cpu_seconds)
                finally:
                    done.close()
        return outcomes

    def _child_uid(self) -> int | None:
        return _NOBODY if self._servers[0].hello["uid_drop"] else None


_PROBE = """
import os, socket
class Solution:
    def probe(self):
        return [self.attempt(lambda: os.open("/proc/self/environ", os.O_RDONLY)),
                self.attempt(lambda: socket.socket())]
    def attempt(self, action):
        try:
            action()
        except PermissionError:
            return "refused"
        return "open"
"""


def _require(offer: confine.Offer, minimum: str) -> None:
    missing = []
    if minimum != "unsafe" and not offer.seccomp:
        missing.append("seccomp filters (Linux 3.5 or later, x86_64 or aarch64)")
    if minimum == "landlock" and offer.landlock is None:
        missing.append("Landlock (Linux 5.13 or later, listed in the boot parameter lsm=)")
    if missing:
        weaker = "seccomp or unsafe" if offer.seccomp else "unsafe, for programs that you trust"
        raise SandboxUnavailable(
            f"the sandbox must offer at least {minimum!r}, but this machine lacks {' and '.join(missing)}. "
            f"Use another machine, or accept less with minimum={weaker}."
        )
