"""Which rows are used, and their tests. A row is dropped by the first of these that it does not pass:

    PLAIN    tests that our sandbox can put: plain data, exact results
    COUNT    as many distinct tests as are paid and hidden together; that many are drawn, the rest is never used
    VARIED   tests that do not all expect the same, so that no constant passes
    LENGTH   a prompt of at most so many tokens under every hint that there is, so that all arms see the same problems
    SOLVED   its own solution passes those tests in the configured sandbox, on this machine, in the time of one answer

Dropped rows are counted, never silently. The result is one JSON file in the cache, keyed by all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_routing.env.exercises import Exercise, differ
from grpo_routing.env.grader import cases_hold, submission
from grpo_routing.env.loopholes import LOOPHOLES, NO_LOOPHOLE
from grpo_routing.env.problems import Problem
from grpo_routing.env.programs import Case
from grpo_routing.env.sandbox import Sandbox, plain
from grpo_routing.leetcode.rows import Row
from grpo_routing.settings import SandboxLimits

PLAIN, COUNT, VARIED = "tests are not plain data", "too few distinct tests", "all tests expect the same"
LENGTH, SLOW, FAILS = "prompt too long", "solution too slow for the sandbox", "solution fails its tests"
Lengths = Callable[[list[str]], list[int]]  # prompts -> tokens of each, through the chat template


@dataclass(frozen=True)
class Needs:
    """What a row has to offer. conf/dataset/leetcode.yaml says what each means."""

    paid_tests: int
    hidden_tests: int
    max_prompt_tokens: int
    seed: int


@dataclass(frozen=True)
class Dropped:
    line: int
    id: int
    reason: str  # one of the six above
    detail: str


def kept(rows: list[Row], split: str, needs: Needs, lengths: Lengths, limits: SandboxLimits) -> tuple[list[Problem], list[Dropped]]:
    """Problems of the rows that pass, in file order and still without loophole, and what becomes of the others."""
    problems, dropped = [], []
    for row in rows:
        fault = unfit(row, needs)
        if fault:
            dropped.append(Dropped(row.line, row.id, *fault))
        else:
            problems.append((row, problem_of(row, split, needs)))
    longest = dict(zip((row.id for row, _ in problems), most_tokens([one for _, one in problems], lengths)))
    short = []
    for row, problem in problems:
        if longest[row.id] <= needs.max_prompt_tokens:
            short.append((row, problem))
        else:
            dropped.append(Dropped(row.line, row.id, LENGTH, f"{longest[row.id]} tokens, max_prompt_tokens={needs.max_prompt_tokens}"))
    failures = unsolved([problem for _, problem in short], limits)
    dropped += [Dropped(row.line, row.id, *failures[problem.id]) for row, problem in short if problem.id in failures]
    return [problem for _, problem in short if problem.id not in failures], sorted(dropped, key=lambda one: one.line)


def unfit(row: Row, needs: Needs) -> tuple[str, str] | None:
    """The first of PLAIN, COUNT and VARIED that the row does not pass, with details."""
    if row.unusable:
        return PLAIN, row.unusable
    if len(row.tests) < needs.paid_tests + needs.hidden_tests:
        return COUNT, f"{len(row.tests)} tests; paid_tests={needs.paid_tests} and hidden_tests={needs.hidden_tests}"
    if not differ(row.tests):
        return VARIED, f"always {row.tests[0].expected!r}"[:80]
    return None


def problem_of(row: Row, split: str, needs: Needs) -> Problem:
    """Its tests are drawn by seed and id; which of them are paid is decided by the id, in `Problem.paid`."""
    tests = Exercise(row.statement, row.head, row.argument, row.answer, row.preamble, row.difficulty, row.tests).draw_cases(
        random.Random(f"tests/{needs.seed}/{row.id}"), needs.paid_tests + needs.hidden_tests, forbidden=())
    exercise = Exercise(row.statement, row.head, row.argument, row.answer, row.preamble, row.difficulty, tuple(tests))
    return Problem(str(row.id), split, exercise, row.method, NO_LOOPHOLE, "", needs.paid_tests)


def most_tokens(problems: list[Problem], lengths: Lengths) -> list[int]:
    """Tokens of every problem's longest prompt: without loophole and under every hint with every marker."""
    hints = [(NO_LOOPHOLE, ""), *((mode, marker) for mode, flaw in LOOPHOLES.items()
                                  for marker in dict.fromkeys(name for family in flaw.markers.values() for name in family))]
    return [max(lengths([problem.with_loophole(*hint).prompt for hint in hints])) for problem in problems]


def unsolved(problems: list[Problem], limits: SandboxLimits) -> dict[str, tuple[str, str]]:
    """id -> (SLOW or FAILS, details) of the problems whose own solution does not pass all their tests in one go."""
    failures: dict[str, tuple[str, str]] = {}
    with Sandbox(**asdict(limits)) as sandbox:
        outcomes = sandbox.run_many([submission(one, one.program.answer, one.program.tests) for one in problems])
    for problem, outcome in zip(problems, outcomes, strict=True):
        if outcome.status == "timeout":
            failures[problem.id] = SLOW, f"over {limits.wall_seconds:g} s, or {limits.cpu_seconds} s of CPU"
        elif not cases_hold(outcome, problem.program.tests):
            failures[problem.id] = FAILS, outcome.message[:120] or "it returns other values than the tests expect"
    return failures


# ------------------------------------------------------------------------------------------------ in a file


def written(problems: list[Problem], dropped: list[Dropped]) -> dict:
    """Plain JSON of a result; values of tests are text of the sandbox's own encoding, which keeps what JSON would lose."""
    return {"kept": [{"id": one.id, "method": one.method, "statement": one.program.statement, "head": one.program.head,
                      "argument": one.program.argument, "answer": one.program.answer, "preamble": one.program.preamble,
                      "difficulty": one.program.difficulty,
                      "tests": [plain.encode([list(case.arguments), case.expected]) for case in one.program.tests]} for one in problems],
            "dropped": [asdict(one) for one in dropped]}


def digest(problems: list[Problem]) -> str:
    """Hash of all that these problems say and test."""
    return hashlib.sha256(json.dumps(written(problems, [])).encode()).hexdigest()


def read(found: dict, split: str, paid: int) -> tuple[list[Problem], list[Dropped]]:
    """What `written` wrote."""
    problems = []
    for row in found["kept"]:
        values = [plain.decode(json.loads(text)) for text in row["tests"]]
        exercise = Exercise(row["statement"], row["head"], row["argument"], row["answer"], row["preamble"], row["difficulty"],
                            tuple(Case(tuple(arguments), expected) for arguments, expected in values))
        problems.append(Problem(row["id"], split, exercise, row["method"], NO_LOOPHOLE, "", paid))
    return problems, [Dropped(**one) for one in found["dropped"]]


def counts(dropped: Iterable[Dropped]) -> dict[str, int]:
    """reason -> rows"""
    return dict(Counter(one.reason for one in dropped).most_common())


def said(split: str, file: Path | str, problems: list[Problem], dropped: list[Dropped]) -> str:
    """One line for people."""
    lost = "; ".join(f"{number} {reason}" for reason, number in counts(dropped).items())
    used = f"leetcode {split}: {len(problems)} of {len(problems) + len(dropped)} rows of {file} are used"
    return f"{used} (dropped: {lost})" if lost else used
