"""Untrusted code: every attack that we could name, in each configuration, with honest work afterwards."""

# ruff: noqa: E501  (attack programs and tables of values read best as one line each)

import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_routing.env.sandbox import (
    Outcome,
    Return,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
    Submission,
    confine,
    plain,
    same,
)
from grpo_routing.env.sandbox.evidence import FILE_KEPT, STDOUT_KEPT, read_small_file

WALL, CPU, MEMORY = 1.0, 1, 256
CALLS = ((1, 2), (3, 4))
RIGHT = (Return("value", 3), Return("value", 7))
HONEST = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
OFFERED = confine.offered()
CONFIGURATIONS = {
    "landlock": (OFFERED, OFFERED.landlock is not None and OFFERED.seccomp),
    "seccomp": (confine.Offer(OFFERED.seccomp, None), OFFERED.seccomp),
}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def box(request):
    offer, possible = CONFIGURATIONS[request.param]
    if not possible:
        pytest.skip(f"this kernel does not offer {request.param}")
    with Sandbox(2, WALL, CPU, MEMORY, request.param, _offered=offer) as made:
        yield made


def submit(code: str, **more) -> Submission:
    return Submission(code, "add", CALLS, **more)


def assert_unharmed(box: Sandbox) -> None:
    """Honest work is right and quick, no process is left, no file is left."""
    started = time.monotonic()
    outcomes = box.run_many([submit(HONEST)] * 2)
    assert [one.returns for one in outcomes] == [RIGHT, RIGHT]
    assert time.monotonic() - started < WALL
    for server in box._servers:
        assert Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text() == ""
    assert box._root is None or os.listdir(box._root) == []


# --- honest work ----------------------------------------------------------------------------------


def test_outcome_of_honest_code(box):
    code = HONEST + "    def __init__(self):\n        self.solved = True\n        print('made')\n"
    code += "def run_tests():\n    print('tested')\n"
    outcome = box.run(submit(code, call_function="run_tests", read_attribute="solved"))
    assert outcome == Outcome("ok", RIGHT, True, True, "made\ntested\n", None, "")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**80),
        1.5,
        float("inf"),
        "é\ud800\n\0",
        [],
        [[1], {}],
        {"a": [1.0]},
        {1: 2, None: {True: []}},
    ],
    ids=repr,
)
def test_plain_values_go_in_and_come_back(box, value):
    outcome = box.run(
        Submission("class Solution:\n def echo(self, x): return x", "echo", ((value,), ([value],)))
    )
    assert same([one.value for one in outcome.returns], [value, [value]])


def test_nan_comes_back(box):
    outcome = box.run(Submission("class Solution:\n def f(self): return float('nan')", "f", ((),)))
    assert same(outcome.returns[0].value, float("nan"))


def test_each_call_gets_fresh_arguments_and_one_raise_is_one_return(box):
    shared = [1, 2]
    code = "class Solution:\n    def f(self, x, boom):\n        x.append(x)\n        x.pop()\n        x.append(0)\n"
    code += "        if boom:\n            raise KeyError('gone')\n        return x"
    outcome = box.run(Submission(code, "f", ((shared, False), (shared, True), (shared, False))))
    kept = Return("value", [1, 2, 0])
    assert outcome.returns == (kept, Return("raised"), kept)
    assert outcome.status == "ok" and outcome.message == "KeyError: gone"


def test_a_returned_list_is_written_down_before_the_next_call_changes_it(box):
    code = "class Solution:\n    seen = []\n    def f(self, x):\n        self.seen.append(x)\n        return self.seen"
    outcome = box.run(Submission(code, "f", ((1,), (2,))))
    assert [one.value for one in outcome.returns] == [[1], [1, 2]]


def test_prelude_and_imports_need_no_file(box):
    code = """
import math, itertools, functools, collections, heapq, bisect, string, re, random, json, operator, datetime
import copy, typing, dataclasses, fractions, decimal, statistics, time, sys, os, enum, abc, io, unittest, queue
from __future__ import annotations
@dataclasses.dataclass
class Point:
    x: int
    y: "Optional[int]" = None
class Solution:
    def f(self, root: Optional[Unknown]) -> List[int]:
        parts = [gcd(4, 6), inf > 3, pow(2, 5, 7), Counter("aab")["a"], bisect_left([1, 3], 2), len(deque([1]))]
        datetime.datetime.strptime("2024-01-02", "%Y-%m-%d"), "ä".encode("latin-1"), statistics.mean([1, 2])
        return parts + [Point(4).x, decimal.Decimal("0.1") + decimal.Decimal("0.2") == decimal.Decimal("0.3")]
""".replace("from __future__ import annotations\n", "")
    outcome = box.run(Submission(code, "f", ((None,),)))
    assert outcome.returns == (Return("value", [2, True, 4, 2, 1, 1, 4, True]),), outcome.message


@pytest.mark.parametrize("read_file", [None, "result.txt"])
def test_everything_that_may_be_imported_can_be_and_nothing_that_it_is_not_named_is_loaded(box, read_file):
    """Modules that the text names are loaded before the child is confined; the path to the library is never seen."""
    names = [*zygote_list("PRELOADED"), *zygote_list("NAMED")]
    code = "".join(f"import {name}\n" for name in names) + "class Solution:\n  def f(self): return [sys.path, len(sys.path_importer_cache)]"
    outcome = box.run(Submission(code, "f", ((),), read_file=read_file))
    assert outcome.returns == (Return("value", [[], 0]),), outcome.message
    asked = "class Solution:\n  def f(self, names): return [name for name in names if name in sys.modules]"
    assert box.run(Submission(asked, "f", ((names,),))).returns == (Return("value", zygote_list("PRELOADED")),)


def zygote_list(name: str) -> list[str]:
    """A list of module names in zygote.py, which is a script and cannot be imported."""
    text = Path(confine.__file__).with_name("zygote.py").read_text()
    return re.search(rf'^{name} = """(.*?)"""', text, re.DOTALL | re.MULTILINE)[1].split()


@pytest.mark.parametrize(
    "code",
    ["datetime.datetime.strptime('2024', '%Y').year", "time.strptime('2024', '%Y').tm_year", "len('\\N{BULLET}' * 2024)",
     "len(('x' * 2024).encode('latin-1'))", "len(('x' * 1011).encode('utf-16')) // 1", "len(('x' * 2024).encode('ascii'))"],
)  # fmt: skip
def test_what_the_prelude_loads_by_itself_is_there(box, code):
    outcome = box.run(Submission(f"class Solution:\n  def f(self): return {code}", "f", ((),)))
    assert outcome.returns == (Return("value", 2024),), outcome.message


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("class Solution:\n  def add(self, a b): pass", "compile_error", "SyntaxError: "),
        ("x = '\\ud800'\n\0", "compile_error", ""),
        ("(" * 9000, "compile_error", ""),
        ("raise ValueError('no')", "error", "ValueError: no"),
        ("import numpy", "error", "ModuleNotFoundError: No module named 'numpy'"),
        ("x = 1", "error", "the code defines no class Solution"),
        ("class Solution: pass", "error", "AttributeError: 'Solution' object has no attribute 'add'"),
        ("class Solution:\n  def __init__(self, x): pass", "error", "TypeError: "),
    ],
)
def test_statuses_of_broken_code(box, code, status, message):
    outcome = box.run(submit(code))
    assert (outcome.status, outcome.message[: len(message)]) == (status, message)
    assert outcome.returns == (Return("missing"),) * 2


# --- side channels that the environment reads -----------------------------------------------------

TESTED = HONEST + "def run_tests():\n    return {value}\n"


@pytest.mark.parametrize(
    ("value", "counts"), [("None", True), ("1", True), ("False", False), ("1 / 0", False)]
)
def test_call_function(box, value, counts):
    assert box.run(submit(TESTED.format(value=value), call_function="run_tests")).function_returned is counts


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        ("    def run_tests(self): pass", True),
        ("setattr(Solution, 'run_tests', lambda self: None)", True),
        ("run_tests = lambda: None", True),
        ("run_tests = 3", False),
        ("setattr(Solution, 'run_' + 'tests', lambda self: None)", False),  # its text does not say so
        ("", False),
    ],
)
def test_where_the_function_may_stand(box, code, counts):
    assert box.run(submit(HONEST + code, call_function="run_tests")).function_returned is counts


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        ("    def __init__(self): self.solved = True", True),
        ("    solved = True", True),
        ("Solution.solved = True", True),
        ("setattr(Solution, 'solved', True)", True),
        ("    solved = property(lambda self: True)", True),
        ("    def __getattr__(self, name): return name == 'solved'", True),
        ("    solved = 1", False),
        ("    solved = 'True'", False),
        ("    def __getattr__(self, name): return True", False),  # its text does not name it
        ("", False),
    ],
)
def test_read_attribute(box, code, counts):
    assert box.run(submit(HONEST + code, read_attribute="solved")).attribute_true is counts


@pytest.mark.parametrize(
    "write",
    ["print('all passed')", "sys.__stdout__.write('all passed\\n')", "os.write(1, b'all passed\\n')"],
)
def test_stdout_is_the_descriptor(box, write):
    assert box.run(submit(HONEST + write)).stdout == "all passed\n"


def test_stdout_is_bounded(box):
    outcome = box.run(submit(HONEST + f"print('x' * {STDOUT_KEPT * 3})"))
    assert outcome.status == "ok" and outcome.stdout == "x" * STDOUT_KEPT


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("open('result.txt', 'w').write('passed')", "passed"),
        ("with open('./result.txt', 'w') as f: f.write('pass'); f.write('ed')", "passed"),
        ("with open('result.txt', 'wb') as f: f.write(b'passed')", "passed"),
        ("import pathlib; pathlib.Path('result.txt').write_text('passed')", "passed"),
        (
            "open('result.txt', 'w').write('no'); f = open('result.txt', 'a'); f.write(' way'); f.close()",
            "no way",
        ),
        ("open('result.txt', 'w').write('x'); open('result.txt', 'w').close()", ""),
        ("f = open('a', 'w'); f.write('q'); f.close(); open('result.txt', 'w').write(open('a').read())", "q"),
        ("open(os.path.join(os.getcwd(), 'result.txt'), 'w').write('passed')", "passed"),
        ("open('other.txt', 'w').write('passed')", None),
        (f"open('result.txt', 'w').write('x' * {FILE_KEPT + 1})", None),
        ("", None),
    ],
)
def test_file_mode(box, code, text):
    outcome = box.run(submit(HONEST + code, read_file="result.txt"))
    assert (outcome.returns, outcome.file_text) == (RIGHT, text), outcome.message
    assert_unharmed(box)


def test_without_file_mode_nothing_can_be_opened(box):
    outcome = box.run(submit(HONEST + "open('result.txt', 'w')"))
    assert (outcome.status, outcome.message) == ("error", "PermissionError: Operation not permitted")


@pytest.mark.parametrize(
    "make",
    [
        "os.symlink('/etc/hostname', {})",
        "os.mkfifo({})",
        "os.mknod({}, 0o20666, os.makedev(1, 3))",
        "os.link('real', {})",
        "os.mkdir({})",
    ],
)
def test_only_a_small_regular_file_is_read(tmp_path, make):
    (tmp_path / "real").write_text("passed")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read_small_file("real", directory) == "passed"
        assert read_small_file("absent", directory) is None
        exec(make.format(repr(str(tmp_path / "result.txt"))).replace("'real'", repr(str(tmp_path / "real"))))
        assert read_small_file("result.txt", directory) is None
    except PermissionError:
        pytest.skip("no right to make a device here")
    finally:
        os.close(directory)


# --- attacks --------------------------------------------------------------------------------------
# name -> (program, allowed statuses). The program must not get the right returns, nor either claim.

ENDLESS = {
    "loop at import": "while True: pass",
    "loop in the method": "class Solution:\n  def add(self, a, b):\n    while True: pass",
    "loop in run_tests": HONEST + "def run_tests():\n  while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "ignores every signal": """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "catches BaseException": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "endless big regular expression": "import re\nre.match('(a*)*b', 'a' * 40)",
    "endless __del__": "class D:\n  def __del__(self):\n    while True: pass\nD()",
    "endless text of an exception at exit": """
class Bad(BaseException):
    def __str__(self):
        while True: pass
    __repr__ = __str__
raise Bad
""",
}

ATTACKS = {
    "sys.exit at import": ("import sys\nsys.exit(0)", "exited"),
    "os._exit at import": ("import os\nos._exit(0)", "exited"),
    "quit in the method": ("class Solution:\n  def add(self, a, b):\n    raise SystemExit(0)", "exited"),
    "os._exit in the method": ("import os\nclass Solution:\n  def add(self, a, b):\n    os._exit(0)", "exited"),
    "os._exit in run_tests": (HONEST + "import os\ndef run_tests(): os._exit(0)", "exited"),
    "memory bomb": ("x = [0]\nwhile True: x = x + x", "memory timeout"),  # a busy machine hands out pages slowly
    "memory bomb kept": ("class Solution:\n  def add(self, a, b):\n    global x\n    x = []\n    while True: x.append(bytearray(1 << 16))", "memory timeout"),
    "one big block": ("x = bytearray(1 << 40)", "memory"),
    "gigabyte of output": ("import sys\nfor _ in range(1024): sys.stdout.write('x' * (1 << 20))", "output_limit"),
    "gigabyte of raw output": ("import os\nx = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, x)", "output_limit"),
    "recursion": ("def f(): f()\nf()", "error"),
    "recursion without limit": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", "memory killed exited timeout"),
    "recursion in C": ("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "memory killed error timeout"),
    "deep program text": ("x = " + "-" * 100_000 + "1", "compile_error killed"),
    "deep list text": ("x = " + "[" * 150 + "]" * 150 + "\n" + "(" * 199 + ")" * 199, "compile_error error"),
    "segmentation fault": ("import sys\nclass X:\n  pass\nimport marshal\neval((lambda: 0).__code__.replace(co_consts=()))", "killed error exited"),
    "abort": ("import os\nos.abort()", "killed"),
    "signals itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "error"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error"),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=lambda: None).start()", "error"),
    "asks for the prompt": ("input()", "error"),
    "closes its channel": ("import os\nos.closerange(0, 100)\nclass Solution:\n  def add(self, a, b): return 0", "exited"),
    "solution is not a class": ("Solution = 3", "error"),
    "metaclass that raises": ("class M(type):\n  def __call__(cls): raise OSError\nclass Solution(metaclass=M): pass", "error"),
    "__new__ returns an int": ("class Solution:\n  def __new__(cls): return 3", "error"),
    "__new__ exits": ("import sys\nclass Solution:\n  def __new__(cls): sys.exit()", "exited"),
    "__getattribute__ raises": ("class Solution:\n  def __getattribute__(self, name): raise KeyError(name)", "error"),
    "exception whose str exits": ("import os\nclass Bad(BaseException):\n  def __str__(self): os._exit(0)\n  __repr__ = __str__\nraise Bad", "error"),
    "exception that lies about its class": ("class Bad(BaseException):\n  __class__ = property(lambda s: SystemExit)\n  args = property(lambda s: 1 / 0)\nraise Bad", "error"),
    "exception with a hostile metaclass": ("class M(type):\n  __name__ = property(lambda c: 1 / 0)\n  def __instancecheck__(c, o): 1 / 0\nclass Bad(Exception, metaclass=M): pass\nraise Bad('x')", "error"),
    "replaces os._exit and os.write": ("import os\nos._exit = os.write = lambda *a: None\nclass Solution:\n  def add(self, a, b): return 0", "ok"),
    "bad namespace": ("globals().clear()", "error"),
    "deletes builtins": ("import builtins\nfor n in list(vars(builtins)):\n  delattr(builtins, n)", "error ok"),
    "tracing": ("import sys\nsys.settrace(lambda *a: 1 / 0)\nclass Solution:\n  def add(self, a, b): return 0", "error ok exited"),
    "lowers the recursion limit": ("import sys\nsys.setrecursionlimit(5 + len(__import__('inspect').stack()))\nclass Solution:\n  def add(self, a, b): return 0", "ok error exited"),
    "closes standard output": ("import sys, os\nsys.stdout.close()\nclass Solution:\n  def add(self, a, b): return 0", "ok"),
    "forged result": (
        "import os, json\nframe = {'status': 'ok', 'returns': [['value', 3], ['value', 7]], 'function': True, 'attribute': True, 'message': ''}\n"
        "for fd in range(3, 20):\n"
        "  try: os.write(fd, json.dumps(frame).encode())\n"
        "  except OSError: pass\n"
        "os._exit(0)",
        "error",
    ),
    "junk before the honest result": (HONEST + "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'junk')\n  except OSError: pass", "error"),
}  # fmt: skip

VALUES = {
    "always equal": "class Any:\n  __eq__ = lambda s, o: True\n  __hash__ = lambda s: 1\n  def __bool__(self): return True\nvalue = Any()",
    "int subclass": "class I(int):\n  __eq__ = lambda s, o: True\nvalue = I(3)",
    "str subclass": "class S(str): pass\nvalue = S('3')",
    "list subclass": "class L(list):\n  __eq__ = lambda s, o: True\nvalue = L([3])",
    "dict subclass": "value = collections.defaultdict(int)",
    "hidden in a list": "class I(int): pass\nvalue = [1, [I(3)]]",
    "hidden in a key": "class S(str): pass\nvalue = {S('3'): 1}",
    "lies about its class": "class X:\n  __class__ = int\nvalue = X()",
    "enum": "import enum\nclass E(enum.IntEnum):\n  A = 3\nvalue = E.A",
    "metaclass with a hostile repr": "class M(type):\n  __repr__ = lambda c: 1 / 0\nclass X(metaclass=M): pass\nvalue = X()",
    "tuple": "value = (1, 2)",
    "set": "value = {1}",
    "bytes": "value = b'3'",
    "complex": "value = 3j",
    "generator": "value = (x for x in itertools.count())",
    "coroutine": "async def f(): return 3\nvalue = f()",
    "too deep": "value = []\nfor _ in range(100_000): value = [value]",
    "inside itself": "value = []\nvalue += [value, value]",
    "too long": "value = list(range(200_000))",
    "too long a text": "value = 'x' * 10**7",
    "too large a number": "value = 1 << 10**6",
    "many shared lists": "value = [0]\nfor _ in range(60): value = [value, value]",
}

# Each returns the names of the things that it managed to do: the right answer is none.
TRIES = """
import os, sys, signal, socket, subprocess, tempfile, threading, time, gc, io
def tries(**actions):
    won = []
    for name, action in actions.items():
        try:
            if action() is not False: won.append(name)
        except (OSError, RuntimeError, ImportError, ValueError, EOFError, AttributeError, TypeError): pass
    return won
class Solution:
    def add(self, a, b): return attack()
PARENT, ZYGOTE = {parent}, {zygote}
"""
PROBES = {
    "network": """tries(
        tcp=lambda: socket.create_connection(('127.0.0.1', 22)), udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        unix=lambda: socket.socket(socket.AF_UNIX), pair=lambda: socket.socketpair(), raw=lambda: socket.socket(socket.AF_PACKET),
        netlink=lambda: socket.socket(socket.AF_NETLINK), name=lambda: socket.getaddrinfo('localhost', 80))""",
    "reading": """tries(
        passwd=lambda: open('/etc/passwd').read(), list=lambda: os.listdir('/'), up=lambda: os.listdir('..'),
        parent=lambda: open(f'/proc/{PARENT}/environ').read(), memory=lambda: open(f'/proc/{PARENT}/mem', 'rb'),
        zygote=lambda: open(f'/proc/{ZYGOTE}/mem', 'rb'), own=lambda: open('/proc/self/environ').read(),
        low=lambda: os.open('/etc/passwd', os.O_RDONLY), path=lambda: os.open('/etc', os.O_PATH | os.O_DIRECTORY) and False,
        link=lambda: os.readlink('/proc/self/exe'), code=lambda: io.open_code('/etc/passwd'), stat=lambda: os.stat('/etc/passwd'),
        proc=lambda: os.listdir('/proc'), descriptors=lambda: os.listdir('/proc/self/fd'), file=lambda: io.FileIO('/etc/passwd'))""",
    "writing": """tries(
        tmp=lambda: open('/tmp/owned-by-submission', 'w'), up=lambda: open('../owned', 'w'), shm=lambda: open('/dev/shm/owned', 'w'),
        device=lambda: open('/dev/null', 'w'), temporary=lambda: tempfile.TemporaryFile(), mkdir=lambda: os.mkdir('d'),
        link=lambda: os.symlink('/etc/passwd', 'result.txt'), hard=lambda: os.link('/etc/passwd', 'result.txt'),
        fifo=lambda: os.mkfifo('result.txt'), node=lambda: os.mknod('result.txt', 0o20666, os.makedev(1, 3)),
        remove=lambda: os.unlink('/tmp/x'), rename=lambda: os.rename('a', 'b'), mode=lambda: os.chmod('.', 0o777),
        owner=lambda: os.chown('.', 0, 0), memory=lambda: os.memfd_create('x'), chdir=lambda: os.chdir('/'), root=lambda: os.chroot('/'),
        truncate=lambda: os.truncate('/tmp/x', 0), utime=lambda: os.utime('/tmp'), pipe=lambda: os.pipe())""",
    "processes": """tries(
        fork=lambda: os.fork(), thread=lambda: threading.Thread(target=print).start(), shell=lambda: os.system('true') == 0,
        spawn=lambda: subprocess.run(['/bin/true']), execute=lambda: os.execv('/bin/true', ['true']), posix=lambda: os.posix_spawn('/bin/true', ['true'], {}),
        pty=lambda: os.forkpty(), session=lambda: os.setsid(), nice=lambda: os.nice(-5), uid=lambda: os.setuid(0), groups=lambda: os.setgroups([0]))""",
    "parent": """tries(
        kill=lambda: os.kill(PARENT, 9), zygote=lambda: os.kill(ZYGOTE, 9), stop=lambda: os.kill(ZYGOTE, 19), group=lambda: os.killpg(ZYGOTE, 9),
        all=lambda: os.kill(-1, 9), probe=lambda: os.kill(PARENT, 0), descriptor=lambda: os.pidfd_open(PARENT), priority=lambda: os.setpriority(os.PRIO_PROCESS, ZYGOTE, 19),
        affinity=lambda: os.sched_setaffinity(ZYGOTE, {0}), limits=lambda: __import__('resource').prlimit(ZYGOTE, 0, (0, 0)))""",
    "limits": """tries(
        memory=lambda: __import__('resource').setrlimit(9, (-1, -1)), alarm=lambda: signal.alarm(1) and False,
        descriptors=lambda: [os.dup(1) for _ in range(64)])""",
}  # fmt: skip


def assert_not_paid(outcome: Outcome) -> None:
    assert outcome.returns != RIGHT
    assert not outcome.function_returned and not outcome.attribute_true


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(box, name):
    code, allowed = ATTACKS[name]
    outcome = box.run(submit(code, call_function="run_tests", read_attribute="solved"))
    assert outcome.status in allowed.split(), outcome
    assert_not_paid(outcome)
    assert_unharmed(box)


def test_endless_programs_end_by_the_clock_with_honest_ones_in_between(box):
    attacks = [submit(code, call_function="run_tests", read_attribute="solved") for code in ENDLESS.values()]
    mixed = [one for attack in attacks for one in (submit(HONEST), attack)]
    started = time.monotonic()
    outcomes = box.run_many(mixed)
    assert time.monotonic() - started < WALL * len(attacks)  # two at a time
    assert all(one.returns == RIGHT for one in outcomes[::2])
    for name, outcome in zip(ENDLESS, outcomes[1::2], strict=True):
        expected = "error" if "text of an exception" in name else "timeout"
        assert outcome.status == expected, (name, outcome)
        assert_not_paid(outcome)
    assert_unharmed(box)


@pytest.mark.parametrize("name", VALUES)
def test_value_that_is_not_plain(box, name):
    body = "\n".join("        " + line for line in VALUES[name].splitlines())
    code = f"class Solution:\n    def add(self, a, b):\n{body}\n        return value\n"
    outcome = box.run(submit(code))
    assert outcome.status == "ok" and outcome.returns == (Return("unsupported"),) * 2, outcome
    assert_unharmed(box)


@pytest.mark.parametrize("read_file", [None, "result.txt"], ids=["no files", "file mode"])
@pytest.mark.parametrize("name", PROBES)
def test_attempt_to_reach_outside(box, name, read_file):
    code = TRIES.replace("{parent}", str(os.getpid())).replace("{zygote}", str(box._servers[0].pid))
    code += f"def attack():\n    return {PROBES[name]}\n"
    outcome = box.run(submit(code, read_file=read_file))
    assert outcome.returns == (Return("value", []),) * 2, outcome
    assert outcome.file_text is None
    assert_unharmed(box)


def test_raw_system_calls_are_refused(box):
    code = """
import gc, types
class Solution:
    def add(self, a, b):
        found = [o for o in gc.get_objects() if isinstance(o, types.ModuleType) and o.__name__ == 'ctypes']
        for frame in [__import__('sys')._getframe()]:
            while frame.f_back:
                frame = frame.f_back
                found += [v for v in frame.f_globals.values() if isinstance(v, types.ModuleType)]
        libraries = [m for f in found for m in [getattr(f, '_libc', None)] if m]
        library = libraries[0]
        # kill, ptrace(ATTACH), process_vm_readv, socket, execve, keyctl, bpf, io_uring_setup, userfaultfd, unshare, clone3
        numbers = [62, 101, 310, 41, 59, 250, 321, 425, 323, 272, 435]
        return [library.syscall(n, 1, 1, 1, 1) for n in numbers if library.syscall(n, 1, 1, 1, 1) != -1]
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    outcome = box.run(submit(code))
    assert outcome.returns == (Return("value", []),) * 2, outcome
    assert_unharmed(box)


def test_expected_values_are_nowhere_in_the_child(box):
    secret = 4_271_828_182_845_904
    code = """
import gc, sys, os
class Solution:
    def add(self, a, b):
        seen, todo = set(), [sys.modules, gc.get_objects(), sys._getframe(), sys.orig_argv, dict(os.environ)]
        frame = sys._getframe()
        while frame:
            todo += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        while todo and len(seen) < 200_000:
            item = todo.pop()
            if id(item) in seen: continue
            seen.add(id(item))
            if type(item) is int and item + 1 == SECRET_AND_ONE: return item
            if type(item) in (list, tuple, set, frozenset): todo += item
            if type(item) is dict: todo += [*item.keys(), *item.values()]
            if hasattr(item, '__dict__'): todo.append(vars(item))
        return [list(os.environ), sys.orig_argv, len(seen) > 1000]
""".replace("SECRET_AND_ONE", str(secret + 1))  # the secret itself would be one of its constants
    outcome = box.run(submit(code))
    assert not same(outcome.returns[0].value, secret)
    assert outcome.returns[0] == Return("value", [[], [""], True]), outcome


@pytest.mark.parametrize(
    "patch",
    [
        "import json\njson.dumps = json.loads = lambda *a, **k: '3'\njson.JSONEncoder.encode = lambda s, o: '3'",
        "import builtins\nbuiltins.type = lambda x: int\nbuiltins.len = lambda x: 1\nbuiltins.isinstance = lambda *a: True",
        "import builtins\nbuiltins.int = builtins.list = builtins.dict = builtins.str = object",
        "import pickle, marshal\npickle.dumps = marshal.dumps = lambda *a: b''",
        "import builtins\nbuiltins.MemoryError = builtins.SystemExit = builtins.BaseException = Exception",
        "import sys\nsys.modules.clear()",
        "import sys, io\nsys.stdout = io.StringIO()\nsys.__stdout__ = None",
        "import signal\nfor n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)",
        "import gc\ngc.disable()\ngc.callbacks.append(lambda *a: 1 / 0)",
        "import atexit, os\natexit.register(os._exit, 3)",
    ],
)
def test_patches_do_not_disturb_an_honest_return(box, patch):
    outcome = box.run(submit(patch + "\n" + HONEST))
    assert outcome.returns == RIGHT, outcome
    assert_unharmed(box)


def test_patches_do_not_make_a_wrong_return_right(box):
    code = "import builtins\nbuiltins.type = lambda x: int\nclass I(int): pass\nclass Solution:\n  def add(self, a, b): return I(a + b)"
    assert box.run(submit(code)).returns == (Return("unsupported"),) * 2


def test_claims_forged_with_the_nonce_need_the_name_in_the_text(box):
    """The remaining hole, and its fence: the nonce can be dug out, but `facts` were sealed before."""
    code = """
import sys, os, json
class Solution:
    def add(self, a, b):
        frame = sys._getframe()
        while 'nonce' not in frame.f_locals: frame = frame.f_back
        for fd in range(4, 64):
            try: os.pwrite(fd, b'confined\\n{"defines": true, "mentions": true}', 0)
            except OSError: pass
        claim = {'status': 'ok', 'returns': [['value', 0]] * 2, 'function': True, 'attribute': True, 'message': ''}
        os.write(3, (frame.f_locals['nonce'] + json.dumps(claim)).encode())
        os._exit(0)
"""
    outcome = box.run(submit(code, call_function="run_tests", read_attribute="solved"))
    assert outcome.status == "ok" and outcome.returns == (Return("value", 0),) * 2  # so the digging worked
    assert not outcome.function_returned and not outcome.attribute_true


@pytest.mark.parametrize(
    "text",
    ["[", "[" * 5000, '{"status":"ok"}', '{"status":"ok","message":1}', "3", "9" * 5000, '{"status":["ok"],"message":""}',
     '{"status":"ok","message":"","returns":[[["value"],3],["value",7]],"function":1,"attribute":1}',
     '{"status":"ok","message":"","returns":[["value",{"dict":3}],["value",{"x":7}]],"function":true,"attribute":true}',
     '{"status":"ok","message":"","returns":{"value":3},"function":true,"attribute":true}',
     '{"status":"ok","message":"","returns":[["value",3]],"function":true,"attribute":true}',
     '{"status":"ok","message":"","returns":[3,7],"function":true,"attribute":true}'],
)  # fmt: skip
def test_forged_frames_of_any_shape_are_an_error_of_the_submission(box, text):
    code = f"""
import sys, os
class Solution:
    def add(self, a, b):
        frame = sys._getframe()
        while 'nonce' not in frame.f_locals: frame = frame.f_back
        os.write(3, (frame.f_locals['nonce'] + {text!r}).encode())
        os._exit(0)
"""
    outcome = box.run(submit(code))
    assert outcome.status == "error" and "channel" in outcome.message


def test_processor_time_is_limited_too(box):
    with Sandbox(1, 30.0, 1, MEMORY, "unsafe", _offered=box._offer) as patient:
        started = time.monotonic()
        assert patient.run(submit("while True: pass")).status == "timeout"
        assert time.monotonic() - started < 15


def test_too_many_files_are_stopped(box):
    code = "i = 0\nwhile True:\n  i += 1\n  open(f'f{i}', 'w').write('x' * 65536)"
    outcome = box.run(submit(code, read_file="result.txt"))
    assert outcome.status in ("output_limit", "error")
    assert_unharmed(box)


def test_file_survives_an_early_exit_in_both_layers(box):
    code = "import os\nf = open('result.txt', 'w'); f.write('passed'); f.close()\nos._exit(0)"
    outcome = box.run(submit(code, read_file="result.txt"))
    assert (outcome.status, outcome.file_text) == ("exited", "passed")


def run_filter(program: bytes, number: int, architecture: int, argument_3: int = 0) -> int:
    """A classic BPF machine of three instructions, independent of the kernel's."""
    instructions = list(struct.iter_unpack("<HBBI", program))
    data = struct.pack("<IIQ6Q", number, architecture, 0, 0, 0, 0, argument_3, 0, 0)
    position = accumulator = 0
    while True:
        code, yes, no, constant = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, constant)[0]
        elif code == 0x06:
            return constant
        else:
            position += yes if (accumulator == constant if code == 0x15 else accumulator >= constant) else no


@pytest.mark.parametrize("profile", confine.PROFILES)
@pytest.mark.parametrize(
    ("column", "machine", "architecture"), [(0, "x86_64", 0xC000003E), (1, "aarch64", 0xC00000B7)]
)
def test_filter_allows_exactly_its_profile(profile, column, machine, architecture):
    program = confine.assemble(profile, machine)
    numbers = {pair[column] for pair in confine.PROFILES[profile].values()}
    for number in range(600):
        verdict = 0x7FFF0000 if number in numbers else 0x50000 | (38 if number == 435 else 1)
        assert run_filter(program, number, architecture) == verdict, number
        assert run_filter(program, number, 0x40000003) == 0x80000000  # another calling convention: killed
        assert run_filter(program, number | 0x40000000, architecture) == 0x50001  # x32
    fstatat = {"x86_64": 262, "aarch64": 79}[machine]
    assert (run_filter(program, fstatat, architecture, 0x1000) == 0x7FFF0000) is (profile != "closed")


# --- the sandbox itself ---------------------------------------------------------------------------


def test_order_is_kept_under_mixed_attackers(box):
    attackers = [submit(code) for code, _ in ATTACKS.values() if "while True" not in code][:12]
    honest = [Submission(HONEST, "add", ((i, i),)) for i in range(24)]
    mixed = [one for pair in zip(honest[::2], attackers, honest[1::2], strict=True) for one in pair]
    outcomes = box.run_many(mixed)
    assert [one.returns[0].value for i, one in enumerate(outcomes) if i % 3 != 1] == [
        2 * i for i in range(24)
    ]
    assert box.run_many([]) == []


def test_same_submission_same_outcome(box):
    code = "import random\nclass Solution:\n  def add(self, a, b): return [random.random(), list({'a', 'b', 'c'}), hash('x')]\nprint(hash('y'))"
    many = box.run_many(
        [submit(code)] * 6
        + [submit("raise ValueError(object())")] * 2
        + [submit("raise ValueError(str(object()))")] * 4
    )
    assert (
        len(set(map(repr, many[:6]))) == len(set(map(repr, many[6:8]))) == len(set(map(repr, many[8:]))) == 1
    )
    assert many[-1].message == "ValueError: <object object at 0x...>"


def test_threads_of_the_caller_may_share_it(box):
    results = {}

    def work(number):
        results[number] = [
            box.run(Submission(HONEST, "add", ((number, i),))).returns[0].value for i in range(5)
        ]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert results == {n: [n + i for i in range(5)] for n in range(4)}


def test_layers_say_what_is_active(box):
    layers = box.layers
    assert layers["seccomp"] is True and layers["landlock"] == box._offer.landlock
    assert (
        set(layers) == {"seccomp", "landlock", "uid_drop", "description"}
        and "seccomp" in layers["description"]
    )


def test_nothing_is_leaked_into_the_zygote(box, tmp_path):
    marker = tmp_path / "answers"
    with open(marker, "w") as leak:
        os.set_inheritable(leak.fileno(), True)
        with Sandbox(1, WALL, CPU, MEMORY, "unsafe", _offered=box._offer) as other:
            pid = other._servers[0].pid
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert str(marker) not in links
            assert Path(f"/proc/{pid}/environ").read_bytes().count(b"\0") == 2


def test_children_run_without_core_files_and_in_their_own_session(box):
    code = "import resource, os\nclass Solution:\n  def f(self): return [os.getpid(), os.getuid()]"
    pid, uid = box.run(Submission(code, "f", ((),))).returns[0].value
    assert uid == (65534 if box.layers["uid_drop"] else os.getuid())
    assert pid not in [server.pid for server in box._servers]


@pytest.mark.parametrize(
    ("minimum", "offer", "text"),
    [
        ("landlock", confine.Offer(True, None), "lacks Landlock"),
        ("landlock", confine.Offer(False, None), "lacks seccomp filters"),
        ("seccomp", confine.Offer(False, None), "unsafe"),
        ("seccomp", confine.Offer(False, 3), "seccomp"),
    ],
)
def test_less_than_the_minimum_is_refused(minimum, offer, text):
    with pytest.raises(SandboxUnavailable, match=text):
        Sandbox(1, WALL, CPU, MEMORY, minimum, _offered=offer)


def test_unsafe_is_only_limits_and_still_leaves_nothing():
    with Sandbox(1, WALL, CPU, MEMORY, "unsafe", _offered=confine.Offer(False, None)) as box:
        assert "NO seccomp" in box.layers["description"]
        outcome = box.run(submit(HONEST + "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass"))
        assert outcome.returns in (RIGHT, (Return("missing"),) * 2)
        box.run(submit(HONEST + "open('result.txt', 'w').write('x')", read_file="result.txt"))
        assert_unharmed(box)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 1.0, 1, 256, "seccomp"),
        (1, 0, 1, 256, "seccomp"),
        (1, 1.0, 1, 8, "seccomp"),
        (1, 1.0, 1, 256, "none"),
    ],
)
def test_bad_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="expected|minimum is one of"):
        Sandbox(*arguments)


def test_bad_submissions_are_refused():
    with pytest.raises(ValueError, match="plain data"):
        Submission(HONEST, "add", ((1, object()),))
    with pytest.raises(ValueError, match="bare file name"):
        Submission(HONEST, "add", (), read_file="../x")


def test_a_dead_zygote_is_our_error_and_is_not_restarted():
    with Sandbox(1, WALL, CPU, MEMORY, "unsafe") as box:
        os.kill(box._servers[0].pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="fork server of the sandbox is dead"):
            box.run(submit(HONEST))
        with pytest.raises(SandboxError, match="closed"):
            box.run(submit(HONEST))


def test_no_descriptor_is_left():
    before = sorted(os.listdir("/proc/self/fd"))
    with Sandbox(2, WALL, CPU, MEMORY, "unsafe") as box:
        box.run_many(
            [submit(HONEST, read_file="result.txt"), submit("1 / 0"), submit("import os; os._exit(0)")]
        )
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_close_is_final_and_may_be_repeated():
    box = Sandbox(1, WALL, CPU, MEMORY, "unsafe")
    assert box.run(submit(HONEST)).returns == RIGHT
    root, pid = box._root, box._servers[0].pid
    box.close()
    box.close()
    assert not os.path.exists(f"/proc/{pid}") and (root is None or not os.path.exists(root))
    with pytest.raises(SandboxError, match="closed"):
        box.run(submit(HONEST))


def test_the_zygote_and_its_child_end_with_the_parent(tmp_path):
    """The parent is killed while a submission runs: end of file on the control socket ends both."""
    code = (
        "import sys, threading, time\n"
        "from grpo_routing.env.sandbox import Sandbox, Submission\n"
        "box = Sandbox(1, 60.0, 60, 256, 'unsafe')\n"
        "box.layers\n"
        "threading.Thread(target=box.run, args=(Submission('import time; time.sleep(60)', 'f', ()),), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(box._servers[0].pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TMPDIR": str(tmp_path)},  # a killed parent cannot remove its directory
    ) as parent:
        zygote = int(parent.stdout.readline())
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        assert len(children) == 1
        parent.kill()
    deadline = time.monotonic() + 5
    while any(alive(int(pid)) for pid in [zygote, *children]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, True, 1, 1.0, "1", [], [1], [[1.0], {"a": None}], {"a": 1, "b": [2]}, {1: 2}], ids=repr
)
def test_same_holds(value):
    assert same(plain.decode(plain.loads(plain.encode(value))), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (True, 1), (0, False), (1, 1.0), (1.0, 1), ("1", 1), (None, False), ([1], [1, 2]), ([1, 2], [1]), ((1,), [1]),
     ([True], [1]), ({"a": 1}, {"a": True}), ({1: 1}, {True: 1}), ({"a": 1}, {"b": 1}), ({}, []), ({"a": 1}, {"a": 1, "b": 2}),
     (float("nan"), 0.0), ("a", "b")],
)  # fmt: skip
def test_same_refuses(value, expected):
    assert not same(value, expected)


def test_same_with_nan_subclasses_and_its_own_misuse():
    class Number(int):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = int.__hash__

    assert same(float("nan"), float("nan")) and same({"b": 1, "a": 2}, {"a": 2, "b": 1})
    assert not same(Number(3), 3) and not same([Number(3)], [3]) and not same({Number(3): 1}, {3: 1})
    with pytest.raises(TypeError, match="plain data"):
        same((1,), (1,))
