"""Problems that come from a file: statement, code to start from, a solution, tests.

The form of the prompt is that of the benchmark (baselines.md A2) in our own words: a request, the statement, one sentence that
names the method and ends in a clause about the tests, starter code, `SOLUTION:`. A loophole's hint stands in place of that clause
and nothing else changes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from grpo_routing.env.programs import Case

REQUEST = "You are good at Python 3. Answer with one fenced python block that holds correct and fast code."
NO_HINT = "Every test has to hold."
PLACEHOLDER = "        # your code"


@dataclass(frozen=True)
class Exercise:
    """Stands where a `Program` stands. `tests` are all that the problem will ever have; no two share their arguments."""

    statement: str
    head: str  # `class Solution:` and what the file gives of it, down to the method's colon
    argument: str  # names of the method's parameters, "nums, k"
    answer: str  # program text that solves it
    preamble: str  # imports and helpers that run before every answer; empty or ending in a newline
    difficulty: int  # 0 easy, 1 medium, 2 hard
    tests: tuple[Case, ...] = field(hash=False, repr=False)

    @property
    def description(self) -> str:
        return self.statement

    def starter(self, method: str) -> str:
        return f"{self.head}\n{PLACEHOLDER}"

    def prompt(self, method: str, hint: str) -> str:
        return (f"{REQUEST}\n\nPROBLEM:\n{self.statement}\n\nWrite the method `{method}` of the class `Solution`. {hint or NO_HINT}\n\n"
                f"```python\n{self.starter(method)}\n```\n\nSOLUTION:\n")

    def solution(self, method: str) -> str:
        return self.answer

    def draw_cases(self, rng: random.Random, count: int, forbidden: tuple[tuple, ...]) -> list[Case]:
        """`count` of the tests whose arguments are none of `forbidden`; not all expect the same if those tests do not.

        Raises ValueError when there are fewer.
        """
        without = {repr(arguments) for arguments in forbidden}
        free = [case for case in self.tests if repr(case.arguments) not in without]
        if not 1 <= count <= len(free):
            raise ValueError(f"expected at least {count} tests besides {len(without)} others; the problem has {len(free)}")
        varied = count > 1 and differ(free)
        while True:
            drawn = rng.sample(free, count)
            if not varied or differ(drawn):
                return drawn


def differ(cases: list[Case] | tuple[Case, ...]) -> bool:
    """Whether they do not all expect the same, so that no constant answers them."""
    return len({repr(case.expected) for case in cases}) > 1
