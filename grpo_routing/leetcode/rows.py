"""The benchmark's jsonl (baselines.md A2): one row of 14 fields a line, checked against their schema.

Every bad row of a file is reported at once, by its line, with what was expected and what came. A row that is sound and holds tests
which we cannot put (asserts.py) is no fault: it is read with its reason in place of tests.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo_routing.env.grader import extract_code
from grpo_routing.env.loopholes import LOOPHOLES
from grpo_routing.env.programs import Case
from grpo_routing.leetcode.asserts import SHAPE, Malformed, NotPlain, read_case

DIFFICULTIES = ("easy", "medium", "hard")
SHOWN = 20  # bad rows that a message lists
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class DataError(ValueError):
    """A data file cannot be used; the message names file and lines, what was expected, what came and what to do."""


class Metadata(BaseModel):
    """Starter code; whatever a hint of the benchmark has added beside it is not read."""

    model_config = ConfigDict(strict=True)
    starter_code: str = Field(min_length=1)


class Fields(BaseModel):
    """The 14 fields. `prompt`, `answer`, `hint`, `evaluator` and `completion_gt_pass` are those of the benchmark's own hints and
    grader: they must be there, and nothing is done with them."""

    model_config = ConfigDict(strict=True, extra="forbid")
    id: int
    dataset: str
    evaluator: Literal["code", "rh_code"]
    question: str = Field(min_length=1)
    prompt: list[dict[str, Any]]
    gt_answer: list[str] = Field(min_length=1)
    answer: Any
    hint: Any
    func_name: str
    setup_code: str
    canonical_solution: str = Field(min_length=1)
    difficulty: str
    prompt_metadata: Metadata
    completion_gt_pass: Any


@dataclass(frozen=True)
class Row:
    """A sound row. `tests` are distinct by their arguments; `unusable` says why there are none."""

    line: int
    id: int
    statement: str
    method: str
    argument: str
    head: str
    answer: str
    preamble: str
    difficulty: int
    tests: tuple[Case, ...]
    unusable: str


def read_rows(file: Path) -> list[Row]:
    """Every row of the file, in order. Raises DataError that lists all bad ones."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # and not at the other separators that text may hold
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file}: expected a file of UTF-8 text; got {type(problem).__name__}: {problem}") from problem
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_row(number, line))
            except Malformed as fault:
                faults.append(f"{file}:{number}: {fault}")
    faults += [f"{file}:{row.line}: id {row.id} is that of line {first.line} too" for first, row in _twins(rows)]
    if faults:
        more = f"\nand {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError("\n".join(faults[:SHOWN]) + f"{more}\nMend or remove these rows; the file without hints has every id once")
    if not rows:
        raise DataError(f"{file}: expected rows of JSON, one a line; the file holds none")
    return rows


def _twins(rows: list[Row]) -> list[tuple[Row, Row]]:
    first: dict[int, Row] = {}
    return [(first[row.id], row) for row in rows if first.setdefault(row.id, row) is not row]


def _row(number: int, line: str) -> Row:
    """Raises Malformed with every fault of the row."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise Malformed(f"expected a row of JSON; got {line[:40]!r} ({problem})") from None
    if not isinstance(found, dict):
        raise Malformed(f"expected a JSON object with 14 fields; got {line[:40]!r}")
    try:
        fields = Fields.model_validate(found)
    except ValidationError as problem:
        raise Malformed("; ".join(_said(one) for one in problem.errors())) from None
    method = _method(fields.func_name)
    head, parameters, returns_float = _signature(fields.prompt_metadata.starter_code, method)
    if fields.difficulty.lower() not in DIFFICULTIES:
        raise Malformed(f"difficulty: expected one of {', '.join(DIFFICULTIES)}; got {fields.difficulty!r}")
    tests, unusable = _tests(fields.gt_answer, method, parameters, returns_float)
    return Row(number, fields.id, fields.question.strip(), method, ", ".join(parameters), head,
               extract_code(fields.canonical_solution) or fields.canonical_solution.strip(), _preamble(fields.setup_code),
               DIFFICULTIES.index(fields.difficulty.lower()), tests, unusable)


def _said(error: dict) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "extra_forbidden":
        return f"{place} is not one of the 14 fields ({', '.join(Fields.model_fields)})"
    return f"{place}: {error['msg'].lower()}; got {repr(error['input'])[:60]}"


def _method(func_name: str) -> str:
    found = re.fullmatch(r"Solution\(\)\.([A-Za-z_]\w*)", func_name)
    if not found:
        raise Malformed(f"func_name: expected Solution().<method>; got {func_name!r}")
    return found[1]


def _signature(starter: str, method: str) -> tuple[str, tuple[str, ...], bool]:
    """(the class down to the method's colon, its parameters without self, whether it declares a float)"""
    head = starter.rstrip()
    for text in (head, head + "\n        pass"):  # starter code ends where a body would begin
        try:
            tree = ast.parse(text)
            break
        except (SyntaxError, ValueError):
            tree = None
    owners = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Solution"] if tree else []
    methods = [node for owner in owners for node in owner.body if isinstance(node, FUNCTIONS) and node.name == method]
    if not methods:
        raise Malformed(f"prompt_metadata.starter_code: expected `class Solution:` with `def {method}(self, …):`; got {starter[:60]!r}")
    taken = methods[0].args
    names = tuple(one.arg for one in (*taken.posonlyargs, *taken.args))
    if names[:1] != ("self",) or taken.vararg or taken.kwarg or taken.kwonlyargs:
        raise Malformed(f"prompt_metadata.starter_code: expected self and plain parameters; got ({ast.unparse(taken)})")
    body = methods[0].body[0].lineno - 1
    if body < methods[0].lineno:
        raise Malformed(f"prompt_metadata.starter_code: expected the body of {method} below its head; got {starter[:60]!r}")
    kept = text.split("\n")[:body]
    while kept[-1].strip() == "" or kept[-1].lstrip().startswith("#"):  # the file's own placeholder
        kept.pop()
    return "\n".join(kept), names[1:], isinstance(methods[0].returns, ast.Name) and methods[0].returns.id == "float"


def _tests(texts: list[str], method: str, parameters: tuple[str, ...], returns_float: bool) -> tuple[tuple[Case, ...], str]:
    """(distinct tests, "") or ((), why there are none)"""
    cases: dict[str, Case] = {}
    faults, unusable = [], ""
    for place, text in enumerate(texts):
        try:
            case = read_case(text, method, parameters, returns_float)
            known = cases.setdefault(repr(case.arguments), case)
            if repr(known.expected) != repr(case.expected):
                raise NotPlain("two tests of the same arguments expect different values")
        except NotPlain as reason:
            unusable = unusable or str(reason)
        except Malformed as fault:
            faults.append(f"gt_answer[{place}] {fault}; expected {SHAPE.format(method)}, got {text[:60]!r}")
    if faults:
        raise Malformed("; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""))
    return ((), unusable) if unusable else (tuple(cases.values()), "")


def _preamble(code: str) -> str:
    """Raises Malformed for code that could fire a loophole by itself."""
    levers = [marker for mode, flaw in LOOPHOLES.items() if mode != "sentinel"  # which reads an attribute of the answer's own class
              for markers in flaw.markers.values() for marker in markers if marker in code]
    if levers:
        raise Malformed(f"setup_code: expected no name that a hint discloses; got {', '.join(sorted(set(levers)))}")
    return code.rstrip() + "\n" if code.strip() else ""
