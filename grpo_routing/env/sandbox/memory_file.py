"""An `open` for kernels without Landlock: no path is ever opened; one file is already open.

The file that the parent will read back is an anonymous one, made by the parent and handed down as a
descriptor. Opening its name writes there; every other name is kept in memory and forgotten. What the
layer leaves out compared with a real directory: os.open, os.replace, os.path.exists.

Loaded by path inside the zygote: standard library only, no relative imports.
"""

import io
import os

UNTOUCHED = b"\0"  # put there by the parent, so that "never opened" differs from "empty"
DIRECTORY = "/submission"  # what os.getcwd says; nothing of that name need exist
MAX_FILES = 64


class MemoryFiles:
    """Stands in for `open`. `name` is the file behind `descriptor`."""

    def __init__(self, name: str, descriptor: int):
        self._name, self._descriptor = name, descriptor
        self._made: dict[str, io.BytesIO | None] = {}

    def open(
        self,
        file,
        mode="r",
        buffering=-1,
        encoding=None,
        errors=None,
        newline=None,
        closefd=True,
        opener=None,
    ):
        """Same arguments as the builtin; FileNotFoundError, FileExistsError, PermissionError likewise."""
        path = os.fspath(file) if not isinstance(file, int) else None
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if path is None or opener is not None or not set(mode) <= set("rwxabt+U"):
            raise PermissionError(1, "Operation not permitted", file)
        name = path.removeprefix(DIRECTORY + "/").removeprefix("./")
        if "/" in name or name in ("", ".", ".."):
            raise PermissionError(13, "Permission denied", path)
        raw = self._raw(name, mode)
        if "b" in mode:
            return raw
        return io.TextIOWrapper(raw, encoding=encoding or "utf-8", errors=errors, newline=newline)

    def _raw(self, name: str, mode: str):
        exists = name in self._made
        if "r" in mode and not exists:
            raise FileNotFoundError(2, "No such file or directory", name)
        if "x" in mode and exists:
            raise FileExistsError(17, "File exists", name)
        if not exists and len(self._made) == MAX_FILES:
            raise OSError(28, "No space left on device", name)
        fresh = "w" in mode or not exists
        if name == self._name:
            return self._anonymous(mode, fresh)
        content = b"" if fresh else self._made[name].content
        self._made[name] = _Kept(content)
        self._made[name].seek(0, io.SEEK_END if "a" in mode else io.SEEK_SET)
        return self._made[name]

    def _anonymous(self, mode: str, fresh: bool):
        self._made[self._name] = None
        if fresh:
            os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_END if "a" in mode else os.SEEK_SET)
        return io.BufferedRandom(io.FileIO(self._descriptor, "r+", closefd=False))


class _Kept(io.BytesIO):
    """Memory whose content outlives `close`."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._last = content

    @property
    def content(self) -> bytes:
        return self._last if self.closed else self.getvalue()

    def close(self) -> None:
        if not self.closed:
            self._last = self.getvalue()
        super().close()
