"""The warm fork server: a script run as `python -P -s -S zygote.py`, with its control socket as fd 0.

    parent --(run, descriptors)--> zygote --fork--> child: confine itself, drive the submission, _exit
    parent <--(how it ended)------ zygote <--wait--'

It starts from an empty environment, so it never held an expected value; it is single-threaded, so a
fork is safe; it never reads what a submission wrote, so it cannot be talked into anything. One child
at a time. It ends when the control socket does, and its child with it.
"""

# ruff: noqa: E402  (one thing has to happen before random and threading are imported)
import builtins
import gc
import importlib
import json
import marshal
import os
import sys

os.register_at_fork = lambda **hooks: None  # random's reseed and threading's locks cost 1.5 ms a fork

import random
import resource
import select
import signal
import socket
import time
import types
import warnings

CHILD_FAILED = 81  # exit status of a child that could not confine itself
NOBODY = 65534
POLL_DIRECTORY = 0.02  # seconds between looks at how many files a submission has made
MAX_FILES = 64
RESERVED = 10  # descriptors below this are not used by the zygote itself
CONFINED = b"confined\n"  # first line of the facts: everything after it is the driver's

# Importable by a submission although no file can be opened. A fork copies the zygote's page tables and its child copies every page that
# it writes to, so a module costs every submission something: these are loaded before the first fork, because code reaches them without
# naming them (the prelude below, codecs, strptime, "\N{...}") ...
PRELOADED = """
    abc array ast bisect calendar codecs collections collections.abc contextlib copy copyreg datetime enum errno functools gc heapq
    importlib io itertools json keyword math operator os os.path random re signal socket string struct sys time types typing
    unicodedata warnings weakref _strptime encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16
""".split()

# ... and these by the child of a submission whose text names them, while it can still open files.
NAMED = """
    base64 binascii cmath csv dataclasses decimal difflib fractions hashlib inspect logging numbers pathlib pickle pprint queue secrets
    shutil statistics subprocess tempfile textwrap threading timeit traceback unittest urllib.parse uuid zlib
""".split()

# What the code of a submission finds in scope, as on the sites that such problems come from.
PRELUDE_MODULES = """
    bisect collections copy datetime functools heapq itertools json math operator os random re string sys time
    typing
""".split()
PRELUDE_NAMES = ["bisect", "collections", "functools", "heapq", "itertools", "math", "typing"]


def load(name: str) -> types.ModuleType:
    """A sibling file as a module with builtins of its own, which no submission can patch by name."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    with open(path, encoding="utf-8") as file:
        source = file.read()
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = dict(vars(builtins))
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    del sys.modules[name]
    return module


def prelude() -> dict:
    """Namespace of the module `submission`. Star names that would hide a builtin (math.pow) are left out."""
    module = types.ModuleType("submission")
    namespace = vars(module)
    for name in PRELUDE_MODULES:
        namespace[name] = sys.modules[name]
    for module_name in PRELUDE_NAMES:
        source = sys.modules[module_name]
        for name in getattr(source, "__all__", None) or [n for n in vars(source) if n[0] != "_"]:
            if not hasattr(builtins, name) and name not in PRELUDE_MODULES:
                namespace[name] = getattr(source, name)
    namespace["__builtins__"] = builtins
    sys.modules["submission"] = module
    return namespace


class Zygote:
    """Settings, and everything that is made once and used by every child."""

    def __init__(self, control: socket.socket, settings: dict):
        self.control, self.pid = control, os.getpid()
        self.wall_seconds = settings["wall_seconds"]
        self.landlock = settings["landlock"]
        self.filters = {}
        confine.adopt_orphans()
        confine.give_up_privileges()
        if settings["seccomp"]:
            self.filters = {profile: confine.Filter(profile) for profile in confine.PROFILES}
        self.no_files = confine.new_ruleset(self.landlock) if self.landlock else None
        memory, output, cpu = (settings[key] for key in ("memory_bytes", "output_bytes", "cpu_seconds"))
        self.limits = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, 0),  # bites only without root; seccomp refuses clone anyway
            (resource.RLIMIT_FSIZE, output),  # of each file: standard output, result, own files
            (resource.RLIMIT_CPU, cpu),  # equal soft and hard limit: SIGKILL, not a signal to catch
            (resource.RLIMIT_AS, memory),
        ]
        self.drops_uid = os.getuid() == 0 and self.can_drop_uid()
        self.namespace, self.path = prelude(), list(sys.path)
        self.wake_reader, self.wake_writer = socket.socketpair()
        for end in (self.wake_reader, self.wake_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake_writer.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.poller = select.poll()
        self.poller.register(self.control, 0)  # hang-up only: the next job may already be waiting
        self.poller.register(self.wake_reader, select.POLLIN)

    def can_drop_uid(self) -> bool:
        """Root of a user namespace may have no second user; find out in a child."""
        child = os.fork()
        if child == 0:
            try:
                drop_uid()
            except OSError:
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    # --- parent side of the fork ---

    def serve(self) -> None:
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.control, 4096, 8)
            if not message:
                return  # the parent is gone
            job = json.loads(message)
            started = time.monotonic()
            child = os.fork()
            if child == 0:
                self.become_submission(job, descriptors)
            directory = descriptors[4] if job["directory"] else None
            for descriptor in descriptors:
                if descriptor != directory:
                    os.close(descriptor)
            report = self.wait(child, started + self.wall_seconds, directory)
            if directory is not None:
                os.close(directory)
            self.sweep()
            self.control.send(json.dumps(report).encode())

    def wait(self, child: int, deadline: float, directory: int | None) -> dict:
        """Until the child ends or must be ended. It is ours and unreaped, so its pid cannot be reused
        before `wait4`: the kill is as safe as one through a pidfd and works on kernels before 5.3."""
        reason = None
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                cpu = usage.ru_utime + usage.ru_stime
                return {"status": status, "reason": reason, "cpu_seconds": cpu}
            remaining = deadline - time.monotonic()
            if reason is None and remaining <= 0:
                reason = "timeout"
            if reason is None and directory is not None and len(os.listdir(directory)) > MAX_FILES:
                reason = "output_limit"
            if reason is not None:
                os.kill(child, signal.SIGKILL)
                pause = None
            else:
                pause = 1000 * (remaining if directory is None else min(remaining, POLL_DIRECTORY))
            for descriptor, _ in self.poller.poll(pause):
                if descriptor == self.wake_reader.fileno():
                    self.wake_reader.recv(64)
                else:  # the parent is gone
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    os._exit(0)

    def sweep(self) -> None:
        """Kill what a submission left behind; with seccomp there is nothing, as clone is refused."""
        deadline = time.monotonic() + 10
        while True:
            try:
                reaped, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if reaped:
                continue
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError("a process of a submission survives SIGKILL")
            time.sleep(0.001)

    # --- child side of the fork ---

    def become_submission(self, job: dict, descriptors: list[int]) -> None:
        """Never returns. Until CONFINED stands in the facts, a failure is ours, not the submission's."""
        leave = os._exit  # bound now: the submission may put something else there
        os.dup2(descriptors[1], driver.FACTS)
        try:
            request = marshal.loads(os.pread(descriptors[0], os.fstat(descriptors[0]).st_size, 0))
            load_named(request[1], self.path)
            self.confine_child(job, descriptors)
            os.write(driver.FACTS, CONFINED)
        except BaseException as problem:
            os.write(driver.FACTS, f"{type(problem).__name__}: {problem}".encode()[:2000])
            leave(CHILD_FAILED)
        try:
            driver.serve(request, self.namespace, plain.encode, plain.NotPlain, sys.stdout.flush)
        finally:
            leave(CHILD_FAILED)

    def confine_child(self, job: dict, descriptors: list[int]) -> None:
        """Give up, in this order: the terminal and descriptors, files, the uid, limits, system calls."""
        _, _, result, stdout, *own = descriptors  # all >= RESERVED, see `reserve_descriptors`
        profile, ruleset, kept = "closed", self.no_files, 5
        os.setsid()
        os.dup2(1, 0)  # the zygote's standard output is /dev/null
        os.dup2(1, 2)
        os.dup2(stdout, 1)
        os.dup2(result, driver.RESULT)
        if job["directory"]:
            profile, ruleset = "directory", confine.new_ruleset(self.landlock)
            confine.allow_small_files(ruleset, self.landlock, own[0])
            os.fchdir(own[0])
        elif job["memory_file"] is not None:
            profile, kept = "one_file", 6
            os.dup2(own[0], driver.FACTS + 1)
            files = memory_file.MemoryFiles(job["memory_file"], driver.FACTS + 1)
            builtins.open = sys.modules["io"].open = files.open
            os.getcwd = lambda: memory_file.DIRECTORY
        if self.drops_uid:
            drop_uid()
        confine.die_with_parent(signal.SIGKILL)
        if os.getppid() != self.pid:
            os._exit(CHILD_FAILED)  # it died before the line above; nobody would stop our clock
        if ruleset is not None:
            confine.enter(ruleset, self.landlock)
        os.closerange(kept, 256)
        open_files = 16 if job["directory"] else kept
        for limit, value in [(resource.RLIMIT_NOFILE, open_files), *self.limits]:
            resource.setrlimit(limit, (value, value))
        gc.enable()
        if self.filters:
            self.filters[profile].install()


def load_named(code: str, path: list[str]) -> None:
    """Import the NAMED modules whose names stand in the text. `path` is where the standard library lies: a submission does not see it."""
    named = [name for name in NAMED if name.rpartition(".")[2] in code]
    if named:
        sys.path[:] = path
        for name in named:
            importlib.import_module(name)
        sys.path.clear()
        sys.path_importer_cache.clear()


def drop_uid() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def reserve_descriptors() -> None:
    """Received descriptors must not sit where a child's own ones go (0 to 5)."""
    while os.dup(1) < RESERVED - 1:
        pass


def warm_up(zygote: Zygote) -> None:
    """Run the path of a child once per opcode specialisation, so that every fork inherits it."""
    code = "class Solution:\n    def f(self, a, b):\n        return [a, {b: 1.5}, None, True]\n"
    for _ in range(20):
        namespace = dict(zygote.namespace)
        _, program = driver.prepare(code, "check", "checked")
        driver.drive(program, namespace, "f", [([1], "b")], None, None, plain.encode, plain.NotPlain)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # we end with the control socket, not with the job
    reserve_descriptors()
    control = socket.socket(fileno=0)
    settings = json.loads(control.recv(4096))
    zygote = Zygote(control, settings)
    warm_up(zygote)
    random.seed(0)
    os.environ.clear()
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.argv[:] = sys.orig_argv[:] = [""]
    for name in ("ctypes", "_ctypes", "ctypes._endian"):
        sys.modules.pop(name)  # tidiness, not safety: the kernel does not care who makes the call
    control.send(json.dumps({"uid_drop": zygote.drops_uid}).encode())
    gc.collect()
    gc.disable()
    gc.freeze()
    zygote.serve()


for module_name in PRELOADED:
    importlib.import_module(module_name)
warnings.simplefilter("ignore")  # a SyntaxWarning would look for source lines in files
plain, driver, memory_file, confine = map(load, ("plain", "driver", "memory_file", "confine"))
main()
