"""Drive one submission, inside its confined process. Never returns.

Runs in the same process as the untrusted code, so nothing here can be trusted once that code has
started; the parent knows this and treats the result as a claim. What the code here does, it does to
make lying hard and honest results robust:

  - its builtins are a private copy and its tools are bound before the submission starts, so patched
    builtins, json or os change nothing;
  - it calls no method of a returned object or an exception (no str, no ==): exact types are written
    down, everything else is named "unsupported";
  - facts about the program text are written and sealed *before* any of it runs.

Loaded by path inside the zygote: standard library only, no relative imports.
"""

import __future__

import ast
import json
import os
import sys

RESULT, FACTS = 3, 4  # descriptors; FACTS is closed before the submission starts
MAX_RESULT = 240 * 1024  # characters; a little less than the parent's RLIMIT_FSIZE
_MISSING = object()
_ANNOTATIONS = __future__.annotations.compiler_flag  # hints are not evaluated: faster, and no NameError

# Bound now, because the submission may rebind the names in their modules.
_write, _exit, _close, _dumps = os.write, os._exit, os.close, json.dumps
_set_recursion_limit, _set_trace, _set_profile = sys.setrecursionlimit, sys.settrace, sys.setprofile
_type_name = type.__dict__["__name__"].__get__
_exception_arguments = BaseException.args.__get__


class EarlyExit(Exception):
    """The submission asked to end the process; there is no result."""


def serve(request: tuple, namespace: dict, encode, NotPlain, flush_stdout) -> None:
    """request: (nonce, code, method, calls, call_function, read_attribute), all from the parent."""
    nonce, code, method, calls, call_function, read_attribute = request
    try:
        tree_facts, program = prepare(code, call_function, read_attribute)
    except Exception as problem:  # whatever the compiler raises is a property of the text
        _send(FACTS, _dumps({"compile_error": describe(problem)}))
        _exit(0)
    _send(FACTS, _dumps(tree_facts))
    _close(FACTS)

    ballast = [bytes(1 << 20)]  # memory to report with, after the submission has eaten the rest
    out_of_memory = nonce + '{"status":"memory","message":"MemoryError"}'
    too_much = nonce + '{"status":"output_limit","message":"the returns are too large together"}'
    try:
        text = nonce + drive(
            program, namespace, method, calls, call_function, read_attribute, encode, NotPlain
        )
    except MemoryError:
        ballast.clear()
        text = out_of_memory
    except EarlyExit:
        text = ""
    try:
        flush_stdout()
    except Exception:
        pass  # standard output was closed or is full: the parent sees what is in it
    _send(RESULT, text if len(text) < MAX_RESULT else too_much)
    _exit(0)


def _send(descriptor: int, text: str) -> None:
    data = text.encode("ascii")
    while data:
        data = data[_write(descriptor, data) :]


def prepare(code: str, call_function: str | None, read_attribute: str | None) -> tuple[dict, object]:
    program = compile(code, "submission", "exec", flags=_ANNOTATIONS, dont_inherit=True)
    facts = {"defines": False, "mentions": False}
    wanted = [name for name in (call_function, read_attribute) if name is not None]
    # Parsing costs more than running; in plain ASCII a name that is not in the text is not in the tree.
    if wanted and (not code.isascii() or any(name in code for name in wanted)):
        bound, named = _names(ast.walk(ast.parse(code)))
        facts = {"defines": call_function in bound, "mentions": read_attribute in named}
    return facts, program


def _names(nodes) -> tuple[set, set]:
    """Names that the text binds, and those plus the attributes that it reads. A string constant counts,
    because `setattr(Solution, "name", ...)` and `globals()["name"] = ...` bind a name too."""
    bound, used = set(), set()
    for node in nodes:
        kind = type(node)
        if kind in (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
            bound.add(node.name)
        elif kind is ast.Name and type(node.ctx) is ast.Store:
            bound.add(node.id)
        elif kind is ast.Attribute:
            used.add(node.attr)
            if type(node.ctx) is ast.Store:
                bound.add(node.attr)
        elif kind is ast.alias:
            bound.add(node.asname or node.name)
        elif kind is ast.Constant and type(node.value) is str:
            bound.add(node.value)
    return bound, bound | used


def drive(program, namespace, method, calls, call_function, read_attribute, encode, NotPlain) -> str:
    """JSON text of what happened. Raises MemoryError or EarlyExit when the submission does."""
    problems: list[str] = []
    instance, bound = _start(program, namespace, method, problems)
    if bound is _MISSING:
        return '{"status":"error","message":' + encode(problems[0]) + "}"

    returns = []
    for arguments in calls:
        value = _attempt(problems, bound, *arguments)
        returns.append('["raised"]' if value is _MISSING else _written(value, encode, NotPlain, problems))

    function_returned = attribute_true = False
    if call_function is not None:
        function = _attempt(problems, getattr, instance, call_function, _MISSING)
        if function is _MISSING:
            function = namespace.get(call_function, _MISSING)
        if function is not _MISSING:
            value = _attempt(problems, function)
            function_returned = value is not _MISSING and value is not False
    if read_attribute is not None:
        for owner in (instance, namespace.get("Solution")):
            value = _attempt(problems, getattr, owner, read_attribute, _MISSING)
            attribute_true = attribute_true or value is True

    _set_trace(None), _set_profile(None), _set_recursion_limit(1000)
    claims = '"function":' + encode(function_returned) + ',"attribute":' + encode(attribute_true)
    message = encode(problems[0] if problems else "")
    return '{"status":"ok","returns":[' + ",".join(returns) + "]," + claims + ',"message":' + message + "}"


def _start(program, namespace: dict, method: str, problems: list[str]) -> tuple[object, object]:
    """Run the module, make `Solution()` and find its method; _MISSING where that failed."""
    _attempt(problems, exec, program, namespace)
    if problems:
        return _MISSING, _MISSING
    solution = namespace.get("Solution", _MISSING)
    if solution is _MISSING:
        problems.append("the code defines no class Solution")
        return _MISSING, _MISSING
    instance = _attempt(problems, solution)
    if instance is _MISSING:
        return _MISSING, _MISSING
    return instance, _attempt(problems, getattr, instance, method)


def _attempt(problems: list[str], action, *arguments):
    """Result of `action(*arguments)`; _MISSING if it raised, and then `problems` says what."""
    try:
        return action(*arguments)
    except SystemExit:
        raise EarlyExit from None
    except MemoryError:
        raise
    except BaseException as problem:  # the submission may raise anything at all
        problems.append(describe(problem))
        return _MISSING


def _written(value: object, encode, NotPlain, problems: list[str]) -> str:
    """Written down at once: a later call may change the very list that this one returned."""
    try:
        return '["value",' + encode(value) + "]"
    except (NotPlain, RecursionError) as problem:
        problems.append(describe(problem))
        return '["unsupported"]'


def describe(problem: BaseException) -> str:
    """Type and first text argument, without calling the exception's own methods."""
    arguments = _exception_arguments(problem)
    texts = [item for item in arguments if type(item) is str] if type(arguments) is tuple else []
    name = _type_name(type(problem))
    return (name + ": " + texts[0] if texts else name)[:200]
