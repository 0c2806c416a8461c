"""What one submission is given, and what it left behind: descriptors made and read by the parent.

    request   in   program and arguments; closed before the program starts
    facts     out  what the text of the program says; written and closed before the program starts,
                   so it is true whatever the program does
    result    out  what the driver saw. The program shares the driver's process and could write here
                   too: a claim. A wrong return value is caught by the caller's comparison. A forged
                   "the function returned" or "the attribute is True" needs the nonce out of the
                   driver's frames, and counts only if `facts` says that the text names it.
    stdout    out  descriptor 1 itself, so print, sys.__stdout__ and os.write(1, ...) all count
    file      out  a directory under Landlock, else one anonymous file

All but the directory are anonymous files in memory, bounded by RLIMIT_FSIZE: no reader has to keep up
with a flood, and nothing can block.
"""

import marshal
import os
import re
import secrets
import shutil
import signal
import stat

from grpo_routing.env.sandbox import memory_file, plain
from grpo_routing.env.sandbox.nouns import Outcome, Return, SandboxError, Submission

OUTPUT_BYTES = 256 * 1024  # of standard output, of the result, of each file
STDOUT_KEPT = 4096
FILE_KEPT = 64 * 1024
CONFINED = b"confined\n"
_NO_SHARING = 2  # marshal format without references: every call gets arguments of its own
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_FORGED = "the result is not what the driver writes: the submission wrote on its channel"


class Evidence:
    """Descriptors of one submission, from before its start until its Outcome. Close it."""

    def __init__(self, submission: Submission, root: str | None, owner: int | None):
        """root: where to make the directory of a file-mode submission; None: use an anonymous file.
        owner: uid that the child will run under, if not ours."""
        self.submission = submission
        self.nonce = secrets.token_hex(16)
        self.path = None
        self.descriptors: list[int] = []
        request = marshal.dumps(
            (self.nonce, submission.code, submission.method, [list(call) for call in submission.calls],
             submission.call_function, submission.read_attribute),
            _NO_SHARING,
        )  # fmt: skip
        try:
            for name in ("request", "facts", "result", "stdout"):
                self.descriptors.append(os.memfd_create(name))
            _write(self.descriptors[0], request)
            if submission.read_file is not None:
                self.descriptors.append(self._place_for_file(root, owner))
        except BaseException:
            self.close()
            raise

    def _place_for_file(self, root: str | None, owner: int | None) -> int:
        if root is None:
            descriptor = os.memfd_create("file")
            os.write(descriptor, memory_file.UNTOUCHED)
            return descriptor
        path = os.path.join(root, self.nonce)
        os.mkdir(path, 0o700)
        self.path = path
        if owner is not None:
            os.chown(path, owner, owner)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    @property
    def job(self) -> dict:
        """What the zygote must know; it never sees the program."""
        in_memory = self.submission.read_file if self.path is None else None
        return {"directory": self.path is not None, "memory_file": in_memory}

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())
        if self.path is not None:
            shutil.rmtree(self.path)
            self.path = None

    # --- after the child has ended ---

    def outcome(self, report: dict, cpu_seconds: float) -> Outcome:
        """report: the zygote's account of how the child ended."""
        _, facts, result, stdout = self.descriptors[:4]
        status, claims, message = self._judge(report, cpu_seconds, _read(facts, OUTPUT_BYTES), result)
        printed = os.fstat(stdout).st_size
        if printed >= OUTPUT_BYTES and status != "timeout":
            status, message = "output_limit", f"more than {OUTPUT_BYTES} bytes of standard output"
        returns, function, attribute = claims if status == "ok" else (None, False, False)
        missing = (Return("missing"),) * len(self.submission.calls)
        return Outcome(
            status=status,
            returns=missing if returns is None else returns,
            function_returned=function,
            attribute_true=attribute,
            stdout=_read(stdout, STDOUT_KEPT).decode("utf-8", "replace"),
            file_text=self._file_text(),
            message=_ADDRESS.sub("0x...", message),
        )

    def _judge(self, report: dict, cpu_seconds: float, facts: bytes, result: int) -> tuple:
        """(status, claims or None, message)"""
        ended = report["status"]
        if report["reason"] == "timeout":
            return "timeout", None, "ran longer than its time limit"
        if report["reason"] == "output_limit":
            return "output_limit", None, "made too many files"
        if not facts.startswith(CONFINED):
            text = facts.decode("utf-8", "replace") or f"wait status {ended}"
            raise SandboxError(f"a child could not confine itself, so nothing was run: {text}.")
        if os.WIFSIGNALED(ended):
            number = os.WTERMSIG(ended)
            # The kernel enforces the limit by ticks, which run ahead of the exact time on a busy machine; nothing else
            # here ends a child by SIGKILL after that much work.
            if number == signal.SIGKILL and report["cpu_seconds"] > 0.5 * cpu_seconds:
                return "timeout", None, "ran longer than its time limit"
            return "killed", None, f"ended by {signal.Signals(number).name}"
        facts = facts[len(CONFINED) :]
        if not facts:
            return "memory", None, "ran out of memory while compiling"
        known = plain.loads(facts.decode("ascii"))
        if "compile_error" in known:
            return "compile_error", None, known["compile_error"]
        return self._claims(_read(result, OUTPUT_BYTES), known)

    def _claims(self, data: bytes, known: dict) -> tuple:
        """Check the shape of every part: the submission may have written this."""
        if not data:
            return "exited", None, "ended without a result"
        try:
            text = data.decode("ascii")
            if not text.startswith(self.nonce):
                return "error", None, _FORGED
            claims = plain.loads(text[len(self.nonce) :])
            status, message = claims["status"], claims["message"]
            if type(message) is not str or status not in ("ok", "error", "memory", "output_limit"):
                return "error", None, _FORGED
            if status != "ok":
                return status, None, message[:400]
            returns = tuple(_return(item) for item in claims["returns"])
            function, attribute = claims["function"] is True, claims["attribute"] is True
        except (UnicodeDecodeError, plain.NotPlain, TypeError, KeyError, IndexError):
            return "error", None, _FORGED
        if len(returns) != len(self.submission.calls):
            return "error", None, _FORGED
        return "ok", (returns, function and known["defines"], attribute and known["mentions"]), message[:400]

    def _file_text(self) -> str | None:
        name = self.submission.read_file
        if name is None:
            return None
        if self.path is not None:
            return read_small_file(name, self.descriptors[4])
        size = os.fstat(self.descriptors[4]).st_size
        data = _read(self.descriptors[4], FILE_KEPT)
        if size > FILE_KEPT or data == memory_file.UNTOUCHED:
            return None
        return data.decode("utf-8", "replace")


def _return(item: object) -> Return:
    kind = item[0]
    if kind == "value" and len(item) == 2:
        return Return("value", plain.decode(item[1]))
    if kind not in ("raised", "unsupported") or len(item) != 1:
        raise plain.NotPlain("not a return")
    return Return(kind)


def read_small_file(name: str, directory: int) -> str | None:
    """Text of a regular file of at most 64 KiB with one name, in `directory` (a descriptor); else None.

    Never follows a link and never opens a device or FIFO: looks first, and looks again at what it got."""
    try:
        if not _is_small_regular(os.stat(name, dir_fd=directory, follow_symlinks=False)):
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError:  # absent, or no longer what it was: nothing there that counts
        return None
    try:
        if not _is_small_regular(os.fstat(descriptor)):
            return None
        return _read(descriptor, FILE_KEPT).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def _is_small_regular(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_size <= FILE_KEPT


def _write(descriptor: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _read(descriptor: int, limit: int) -> bytes:
    return os.pread(descriptor, limit, 0)
