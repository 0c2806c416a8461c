"""The nouns of the sandbox: what goes in, what comes out, and the two ways in which *we* fail."""

from dataclasses import dataclass

from grpo_routing.env.sandbox import plain

_ARGUMENT_CHARACTERS = 64 * 1024 * 1024  # of one call; a slip of ours is caught here, not in the child


class SandboxError(RuntimeError):
    """Our failure, not a submission's: it stops the run, because a grade could be wrong."""


class SandboxUnavailable(SandboxError):
    """This machine offers less protection than the configured minimum."""


@dataclass(frozen=True)
class Submission:
    """A program and what to do with it. Holds inputs only; expected values stay with the caller."""

    code: str  # program text, without its markdown fence
    method: str  # method of `class Solution` to drive
    calls: tuple[tuple, ...]  # positional arguments of each call, plain data
    call_function: str | None = None  # afterwards: call this (method of the instance, else of the module)
    read_attribute: str | None = None  # afterwards: is this attribute of the instance or class `True`?
    read_file: str | None = None  # the submission may write small files; read this one. None: no files at all

    def __post_init__(self) -> None:
        if type(self.code) is not str or type(self.method) is not str:
            raise TypeError("Submission.code and .method are text; decode or extract the program first.")
        for arguments in self.calls:
            try:
                plain.encode(list(arguments), _ARGUMENT_CHARACTERS)
            except plain.NotPlain as problem:
                raise ValueError(f"arguments of a call must be plain data: got {problem}.") from None
        name = self.read_file
        if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name):
            raise ValueError(f"read_file is a bare file name; got {name!r}.")


@dataclass(frozen=True)
class Return:
    """What one call gave: "value", "raised", "missing" (never reached) or "unsupported" (not plain)."""

    kind: str
    value: object = None


@dataclass(frozen=True)
class Outcome:
    """What a submission did. Unless `status` is "ok", every return is "missing" and both claims False.

    status        "ok" | "compile_error" | "error" (raised at import, no Solution, no method) |
                  "exited" (no result) | "timeout" | "memory" | "output_limit" | "killed"
    stdout        first 4 KiB of standard output, read by the parent
    file_text     content of `read_file`, read by the parent; None: absent, not regular, or too large
    message       type and text of the first problem
    """

    status: str
    returns: tuple[Return, ...]
    function_returned: bool
    attribute_true: bool
    stdout: str
    file_text: str | None
    message: str
