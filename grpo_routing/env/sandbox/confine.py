"""What the kernel refuses to a submission: a seccomp allow-list and a Landlock domain.

Both are plain system calls, made with ctypes; they need no privilege and no library. A process that
has taken them on cannot give them back, whatever Python code does to itself afterwards.

    seccomp   which system calls exist at all        Linux 3.5,  x86_64 and aarch64
    Landlock  which files the remaining ones reach   Linux 5.13, and switched on in lsm=

Refused calls fail with EPERM, which Python shows as PermissionError: honest code that tries to open
a file gets an ordinary exception, not a dead process.

Loaded by path inside the zygote too: standard library only, no relative imports.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import NamedTuple

# --- system call numbers: (x86_64, aarch64); None where an architecture has no such call ---------

_ALWAYS = {  # memory, time, own signals, and reading or writing what is already open
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "sched_yield": (24, 124),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "rseq": (334, 293),
    "getpid": (39, 172), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "getrusage": (98, 165), "times": (100, 153), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_ON_AN_OPEN_FILE = {"fstat": (5, 80), "ftruncate": (77, 46)}
_OPENING = {"open": (2, None), "openat": (257, 56), "getcwd": (79, 17)}
_FSTATAT = (262, 79)  # how newer C libraries spell fstat: with AT_EMPTY_PATH
_CLONE3 = (435, 435)

PROFILES = {
    "closed": _ALWAYS,  # no file can be opened, named or looked at
    "one_file": _ALWAYS | _ON_AN_OPEN_FILE,  # likewise; one file is already open
    "directory": _ALWAYS | _ON_AN_OPEN_FILE | _OPENING,  # Landlock says which
}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_AT_EMPTY_PATH = 0x1000
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 22, 38, 36
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.syscall.argtypes = [ctypes.c_long] * 5  # number and four arguments; spare ones are ignored
_libc.syscall.restype = ctypes.c_long


class Offer(NamedTuple):
    """What the kernel under us offers."""

    seccomp: bool
    landlock: int | None  # version of the Landlock interface


def offered() -> Offer:
    """Ask the kernel; changes nothing."""
    if not sys.platform.startswith("linux") or platform.machine() not in _ARCHITECTURES:
        return Offer(seccomp=False, landlock=None)
    # A null filter is refused with EFAULT where filters exist and with EINVAL where they do not.
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, 0, 0, 0)
    seccomp = ctypes.get_errno() == errno.EFAULT
    version = _libc.syscall(_LANDLOCK_CREATE, 0, 0, 1, 0)
    return Offer(seccomp=seccomp, landlock=version if version >= 1 else None)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- process-wide switches ------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Descendants whose parent died become our children, so none can get away."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def give_up_privileges() -> None:
    """No program can give us more rights than we have now; seccomp and Landlock ask for it."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def die_with_parent(signal_number: int) -> None:
    """Fires when the parent *thread* ends; right only under a single-threaded parent (the zygote)."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


# --- seccomp --------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class Filter:
    """A seccomp program for one profile. Build once, `install` in every child."""

    def __init__(self, profile: str):
        program = assemble(profile, platform.machine())
        self._code = ctypes.create_string_buffer(program)  # kept: the kernel reads it at install
        self._program = _Program((len(self._code) - 1) // 8, ctypes.addressof(self._code))

    def install(self) -> None:
        address = ctypes.addressof(self._program)
        result = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address, 0, 0)
        _check(result, "prctl(PR_SET_SECCOMP)")


def assemble(profile: str, machine: str) -> bytes:
    """Classic BPF over struct seccomp_data: number at byte 0, architecture at 4, arguments from 16."""
    column, architecture = _ARCHITECTURES[machine]
    numbers = sorted({pair[column] for pair in PROFILES[profile].values()} - {None})
    load, equal, at_least, back = 0x20, 0x15, 0x35, 0x06

    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (back, 0, 0, _KILL_PROCESS),  # a foreign calling convention has other numbers
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # x32: the same kernel entries under other numbers
        (back, 0, 0, _ERRNO | errno.EPERM),
        (equal, 0, 1, _CLONE3[column]),
        (back, 0, 0, _ERRNO | errno.ENOSYS),  # so that the C library falls back to clone, refused below
    ]
    if "fstat" in PROFILES[profile]:  # fstatat on a descriptor is fstat; on a path it would be stat
        program += [
            (equal, 0, 2, _FSTATAT[column]),
            (load, 0, 0, 16 + 8 * 3),
            (equal, len(numbers) + 1, len(numbers), _AT_EMPTY_PATH),
        ]
    for position, number in enumerate(numbers):
        program.append((equal, len(numbers) - position, 0, number))
    program += [(back, 0, 0, _ERRNO | errno.EPERM), (back, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


# --- Landlock -------------------------------------------------------------------------------------

_WRITE_FILE, _READ_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 2, 1 << 8, 1 << 14
_LOG_SAME_EXEC_OFF = 1  # since version 7: do not fill the audit log with a submission's failures


def _file_rights(version: int) -> int:
    """Every right on files that this version can take away."""
    return (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1


def new_ruleset(version: int) -> int:
    """Descriptor of a ruleset that takes away every file, TCP, and (since 6) signals and abstract
    sockets outside the domain. Add exceptions with `allow_small_files`."""
    attributes = struct.pack("<QQQ", _file_rights(version), 3, 3)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    address = ctypes.addressof(buffer)
    descriptor = _libc.syscall(_LANDLOCK_CREATE, address, len(attributes), 0, 0)
    return _check(descriptor, "landlock_create_ruleset")


def allow_small_files(ruleset: int, version: int, directory: int) -> None:
    """Regular files beneath `directory` (a descriptor) may be made, read and written; nothing else."""
    rights = _WRITE_FILE | _READ_FILE | _MAKE_REG | (_TRUNCATE if version >= 3 else 0)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, directory), 12)
    address = ctypes.addressof(rule)
    _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, address, 0), "landlock_add_rule")


def enter(ruleset: int, version: int) -> None:
    """Put the calling process in a domain of its own."""
    flags = _LOG_SAME_EXEC_OFF if version >= 7 else 0
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, flags, 0, 0), "landlock_restrict_self")
