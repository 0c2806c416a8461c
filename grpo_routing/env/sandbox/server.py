"""The parent's side of one zygote: start it, hand it work, hear how a child ended, end it."""

import json
import os
import socket
import subprocess
import sys

from grpo_routing.env.sandbox.nouns import SandboxError

_SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zygote.py")
_START_SECONDS = 60.0
_END_SECONDS = 5.0


class Server:
    """One zygote process. `fileno()` is readable when it has a report."""

    def __init__(self, settings: dict):
        """settings: see `Zygote` in zygote.py. Raises SandboxError if it does not come up."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A separate program with an environment of two words: it cannot hold what it was never given,
        # and this process (threads, CUDA) is never forked. Own session: Ctrl-C is for us, not for it.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", _SCRIPT],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"},
                cwd="/",
                start_new_session=True,
            )
        self._said = ""
        try:
            self._control.settimeout(_START_SECONDS)
            self._control.send(json.dumps(settings).encode())
            self.hello = self.receive()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._control.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, job: dict, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(job).encode()], descriptors)
        except OSError:
            self._raise_dead()

    def receive(self) -> dict:
        """The next report. Raises SandboxError if the zygote is dead or silent."""
        try:
            message = self._control.recv(65536)
        except TimeoutError:
            raise SandboxError(
                f"the fork server said nothing for {self._control.gettimeout():.0f} s. "
                "Is the machine overloaded, or its Python broken?"
            ) from None
        except OSError:
            message = b""
        if not message:
            self._raise_dead()
        return json.loads(message)

    def _raise_dead(self) -> None:
        self.close()
        raise SandboxError(
            f"the fork server of the sandbox is dead (exit status {self._process.returncode}); it is not "
            f"restarted, because a submission must not be able to end it. It said: {self._said or 'nothing'}"
        )

    def close(self) -> None:
        """End it: it exits when its control socket does, and its child with it."""
        if self._process.stderr.closed:
            return
        self._control.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._process.stderr as stream:
            self._said = stream.read().decode("utf-8", "replace").strip()
