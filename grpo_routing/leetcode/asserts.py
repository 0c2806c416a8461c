"""`assert Solution().method(args) == expected` as a test of ours, read from its syntax tree and never run.

    Malformed    no such statement at all, another method, arguments that do not fit: the file is broken
    NotPlain     a sound test that we cannot put: helpers around its values (linked lists, trees), approximate comparison
"""

from __future__ import annotations

import ast

from grpo_routing.env.programs import Case
from grpo_routing.env.sandbox import plain

SHAPE = "assert Solution().{}(…) == expected"


class Malformed(ValueError):
    """The text is not what the schema says."""


class NotPlain(ValueError):
    """The test is sound, and no call with plain data and an exact result."""


def read_case(text: str, method: str, parameters: tuple[str, ...], returns_float: bool) -> Case:
    """The test of one assert statement; keyword arguments are put in the order of `parameters`.

    A whole number that is expected of a method which declares float becomes a float, since our comparison is typed. Raises Malformed
    and NotPlain.
    """
    test = _test(text)
    shape = isinstance(test, ast.Compare) and [type(one) for one in test.ops] in ([ast.Eq], [ast.Is])
    if not shape or not _calls_solution(test.left):
        raise NotPlain("it is not one call that is compared with ==")
    if test.left.func.attr != method:
        raise Malformed(f"calls {test.left.func.attr}, and func_name says {method}")
    arguments = tuple(_value(node) for node in _in_order(test.left, parameters))
    expected = _value(test.comparators[0])
    if returns_float and type(expected) is int:
        expected = float(expected)
    try:
        plain.encode(list(arguments)), plain.encode(expected)
    except plain.NotPlain as problem:
        raise NotPlain(f"a value is {problem}") from None
    return Case(arguments, expected)


def _test(text: str) -> ast.expr:
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise Malformed(f"is no Python: {type(problem).__name__}") from None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise Malformed("is not one assert statement")
    return body[0].test


def _calls_solution(node: ast.expr) -> bool:
    """Whether it is `Solution().name(…)`."""
    owner = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "Solution" and not (
        owner.args or owner.keywords)


def _in_order(call: ast.Call, parameters: tuple[str, ...]) -> list[ast.expr]:
    """The argument of each parameter."""
    if any(isinstance(one, ast.Starred) for one in call.args) or any(word.arg is None for word in call.keywords):
        raise NotPlain("arguments are unpacked with a star")
    names = [*parameters[: len(call.args)], *(word.arg for word in call.keywords)]
    if len(call.args) > len(parameters) or sorted(names) != sorted(parameters):
        raise Malformed(f"gives {', '.join(names) or 'nothing'}, and the method takes {', '.join(parameters) or 'nothing'}")
    given = dict(zip(names, [*call.args, *(word.value for word in call.keywords)]))
    return [given[name] for name in parameters]


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise NotPlain("a value is no literal") from None
