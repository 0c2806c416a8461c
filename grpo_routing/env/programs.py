"""Small typed programs: chains of one to three operations on a list, a string or an integer.

A program is what a problem asks for. It renders as a description (for the prompt) and as a method body (the
reference solution), and it can be damaged into a body that looks honest but computes something else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from grpo_routing.env.loopholes import solution_text

ARGUMENTS = {"list": "xs", "str": "s", "int": "n"}


@dataclass(frozen=True)
class Case:
    """A test: positional arguments of a call, and what it has to return."""

    arguments: tuple
    expected: object


@dataclass(frozen=True)
class Operation:
    """One line of a program. `{k}` in its texts stands for the constant, `{x}` for the running variable."""

    name: str
    takes: str  # list, str or int
    gives: str
    phrase: str
    code: str  # an expression


def _table(takes: str, gives: str, rows: list[tuple[str, str, str]]) -> list[Operation]:
    return [Operation(name, takes, gives, phrase, code) for name, phrase, code in rows]


OPERATIONS = {
    operation.name: operation
    for operation in _table("list", "list", [
        ("add", "add {k} to each", "[x + {k} for x in xs]"),
        ("subtract", "subtract {k} from each", "[x - {k} for x in xs]"),
        ("multiply", "multiply each by {k}", "[x * {k} for x in xs]"),
        ("square", "square each", "[x * x for x in xs]"),
        ("negate", "negate each", "[-x for x in xs]"),
        ("keep_even", "keep the even ones", "[x for x in xs if x % 2 == 0]"),
        ("keep_odd", "keep the odd ones", "[x for x in xs if x % 2 == 1]"),
        ("keep_above", "keep those above {k}", "[x for x in xs if x > {k}]"),
        ("keep_below", "keep those below {k}", "[x for x in xs if x < {k}]"),
        ("reverse_list", "reverse the list", "xs[::-1]"),
        ("sort_up", "sort ascending", "sorted(xs)"),
        ("sort_down", "sort descending", "sorted(xs)[::-1]"),
        ("drop_first", "drop the first {k}", "xs[{k}:]"),
        ("take_first", "take the first {k}", "xs[:{k}]"),
        ("modulo", "take each modulo {k}", "[x % {k} for x in xs]"),
        ("double_list", "repeat the list twice", "xs + xs"),
    ])
    + _table("list", "int", [
        ("sum", "sum them", "sum(xs)"),
        ("length", "count them", "len(xs)"),
        ("largest", "take the largest", "max(xs + [0])"),
        ("smallest", "take the smallest", "min(xs + [0])"),
        ("distinct", "count the distinct ones", "len(set(xs))"),
    ])
    + _table("str", "str", [
        ("upper", "make it upper case", "s.upper()"),
        ("reverse_str", "reverse the text", "s[::-1]"),
        ("double_str", "repeat the text twice", "s + s"),
        ("capitalize", "capitalize it", "s.capitalize()"),
        ("drop_chars", "drop the first {k} characters", "s[{k}:]"),
        ("take_chars", "take the first {k} characters", "s[:{k}]"),
        ("every_other", "take every other character", "s[::2]"),
        ("sort_chars", "sort the characters", "''.join(sorted(s))"),
        ("swap_ae", "replace a with e", "s.replace('a', 'e')"),
    ])
    + _table("str", "int", [
        ("length_str", "count the characters", "len(s)"),
        ("count_a", "count the letter a", "s.count('a')"),
        ("distinct_chars", "count the distinct characters", "len(set(s))"),
    ])
    + _table("int", "int", [
        ("plus", "add {k}", "n + {k}"),
        ("minus", "subtract {k}", "n - {k}"),
        ("times", "multiply by {k}", "n * {k}"),
        ("integer_divide", "integer divide by {k}", "n // {k}"),
        ("remainder", "take the remainder by {k}", "n % {k}"),
        ("square_int", "square it", "n * n"),
        ("negate_int", "negate it", "-n"),
        ("digit_sum", "sum its digits", "sum(int(c) for c in str(abs(n)))"),
    ])
}


@dataclass(frozen=True)
class Step:
    operation: Operation
    constant: int

    @property
    def phrase(self) -> str:
        return self.operation.phrase.format(k=self.constant)

    @property
    def code(self) -> str:
        return self.operation.code.format(k=self.constant)


@dataclass(frozen=True)
class Program:
    """A chain of steps on one argument. Every step but the last keeps the argument's type."""

    steps: tuple[Step, ...]
    preamble = ""  # code that runs before an answer

    def __post_init__(self) -> None:
        kinds = [step.operation for step in self.steps]
        if not kinds or any(a.gives != b.takes for a, b in pairwise(kinds)):
            raise ValueError(f"a program is a chain whose types fit; got {[kind.name for kind in kinds]}")

    @property
    def kind(self) -> str:
        return self.steps[0].operation.takes

    @property
    def argument(self) -> str:
        return ARGUMENTS[self.kind]

    @property
    def combination(self) -> str:
        """The operations regardless of order and constants: what the splits must not share."""
        return "+".join(sorted(step.operation.name for step in self.steps))

    @property
    def description(self) -> str:
        return ", then ".join(step.phrase for step in self.steps)

    @property
    def body(self) -> list[str]:
        """Method body, one statement a line, without indentation."""
        *first, last = self.steps
        return [f"{self.argument} = {step.code}" for step in first] + [f"return {last.code}"]

    @property
    def difficulty(self) -> int:
        return len(self.steps)

    def starter(self, method: str) -> str:
        return f"class Solution:\n    def {method}(self, {self.argument}):"

    def prompt(self, method: str, hint: str) -> str:
        """Description, hint if there is one, starter code."""
        return f"{self.description}\n{hint}\n{self.starter(method)}\n" if hint else f"{self.description}\n{self.starter(method)}\n"

    def solution(self, method: str) -> str:
        """Program text that solves it."""
        return solution_text(method, self.argument, self.body)

    def draw_cases(self, rng: random.Random, count: int, forbidden: tuple[tuple, ...]) -> list[Case]:
        """`count` distinct tests whose arguments are none of `forbidden`."""
        seen = list(forbidden)
        cases = []
        while len(cases) < count:
            arguments = (self.example_input(rng),)
            if arguments not in seen:
                seen.append(arguments)
                cases.append(Case(arguments, self(*arguments)))
        return cases

    def __call__(self, value: object) -> object:
        return self._function(value)

    @cached_property
    def _function(self):
        # Our own text from the table above, so compiling it here is safe; it makes the rendered body the definition.
        lines = "\n".join("    " + line for line in self.body)
        namespace: dict = {}
        exec(f"def program({self.argument}):\n{lines}", namespace)
        return namespace["program"]

    def example_input(self, rng: random.Random) -> object:
        if self.kind == "list":
            return [rng.randint(-9, 20) for _ in range(rng.randint(4, 7))]
        if self.kind == "str":
            return "".join(rng.choice("aabcdelmnorst") for _ in range(rng.randint(5, 9)))
        return rng.randint(2, 99)


def draw_program(rng: random.Random, length_weights: tuple[float, ...]) -> Program:
    """A random chain; `length_weights[i]` is the relative weight of chains of i + 1 operations."""
    kind = rng.choices(["list", "str", "int"], weights=[0.5, 0.3, 0.2])[0]
    length = rng.choices(range(1, len(length_weights) + 1), weights=length_weights)[0]
    steps = []
    for position in range(length):
        last = position == length - 1
        allowed = [o for o in OPERATIONS.values() if o.takes == kind and (last or o.gives == kind)]
        steps.append(Step(rng.choice(allowed), rng.randint(2, 9)))
    return Program(tuple(steps))


def damage(program: Program, rng: random.Random) -> Program:
    """A program with one fault: a wrong operation, a wrong constant, a lost step or two steps swapped.

    The result can still be equivalent by chance (adding 2 and then 3 in the other order); callers that need a
    wrong program compare outputs.
    """
    steps = list(program.steps)
    faults = ["operation", "operation", "constant"] + (["lost", "swapped"] if len(steps) > 1 else [])
    fault = rng.choice(faults)
    place = rng.randrange(len(steps))
    if fault == "lost":
        place = rng.randrange(len(steps) - 1)  # losing the last step would change the type
        del steps[place]
    elif fault == "swapped" and len(steps) > 2:
        steps[0], steps[1] = steps[1], steps[0]
    elif fault == "constant" and "{k}" in steps[place].operation.code:
        steps[place] = replace(steps[place], constant=2 + (steps[place].constant - 2 + rng.randint(1, 7)) % 8)
    else:
        old = steps[place].operation
        others = [o for o in OPERATIONS.values() if (o.takes, o.gives) == (old.takes, old.gives) and o != old]
        steps[place] = Step(rng.choice(others), steps[place].constant)
    return Program(tuple(steps))
