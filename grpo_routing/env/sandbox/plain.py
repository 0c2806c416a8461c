"""Plain data: the only thing that crosses from a submission to us.

    None  bool  int  float  str  list  dict (keys: None, bool, int, float, str)

Types are exact: `type(value) is int`, so neither an int subclass nor an object whose `__eq__`
always says yes has a form that could be written down. The text is JSON with one addition, because
JSON keys are always strings: a dict is written as {"dict": [[key, value], ...]}.

This file is also loaded by path inside the sandbox, hence: standard library only, no relative
imports, and no method of the value is ever called.
"""

import json
from json.encoder import encode_basestring_ascii

MAX_DEPTH = 64  # nesting of lists and dicts
MAX_BITS = 8192  # of an int; Python itself refuses to print more than 4300 digits
MAX_CHARACTERS = 192 * 1024  # of the encoded text of everything that one submission returns

_SCALARS = (type(None), bool, int, float, str)


class NotPlain(ValueError):
    """The value is not plain data, or too large, or too deep."""


def encode(value: object, characters: int = MAX_CHARACTERS) -> str:
    """Text of a plain value, at most `characters` long. Raises NotPlain; runs no code of its class."""
    parts: list[str] = []
    _encode(value, parts, [characters], MAX_DEPTH)
    return "".join(parts)


def _encode(value: object, parts: list[str], room: list[int], depth: int) -> None:
    kind = type(value)
    if kind is list:
        _open(value, room, depth)
        parts.append("[")
        for position, item in enumerate(value):
            if position:
                parts.append(",")
            _encode(item, parts, room, depth - 1)
        parts.append("]")
    elif kind is dict:
        _open(value, room, depth)
        parts.append('{"dict":[')
        for position, (key, item) in enumerate(value.items()):
            parts.append(",[" if position else "[")
            parts.append(_scalar(key, room))
            parts.append(",")
            _encode(item, parts, room, depth - 1)
            parts.append("]")
        parts.append("]}")
    else:
        parts.append(_scalar(value, room))


def _open(value: list | dict, room: list[int], depth: int) -> None:
    """Pay for a container before walking it: [a, a] with a inside itself has 2**64 leaves."""
    if depth == 0:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    _pay(room, 2 + len(value))


def _pay(room: list[int], characters: int) -> None:
    room[0] -= characters
    if room[0] < 0:
        raise NotPlain("too much of it")


def _scalar(value: object, room: list[int]) -> str:
    kind = type(value)
    if kind is int:
        if value.bit_length() > MAX_BITS:
            raise NotPlain(f"an int of more than {MAX_BITS} bits")
        text = int.__repr__(value)
    elif kind is str:
        _pay(room, len(value))  # before the escaped copy is made
        text = encode_basestring_ascii(value)  # lone surrogates become \udxxx and come back
    elif value is None:
        text = "null"
    elif kind is bool:
        text = "true" if value else "false"
    elif kind is float:
        text = _FLOATS.get(float.__repr__(value)) or float.__repr__(value)
    else:
        raise NotPlain(f"a {type.__repr__(kind)[:80]}, not plain data")
    _pay(room, len(text))
    return text


_FLOATS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def decode(parsed: object, depth: int = MAX_DEPTH) -> object:
    """Plain value of what `json.loads` made of `encode`'s text. Raises NotPlain for any other shape."""
    if type(parsed) in _SCALARS:
        return parsed
    if depth == 0:
        raise NotPlain(f"nested deeper than {MAX_DEPTH}")
    if type(parsed) is list:
        return [decode(item, depth - 1) for item in parsed]
    pairs = parsed["dict"] if type(parsed) is dict and list(parsed) == ["dict"] else None
    if type(pairs) is not list:
        raise NotPlain('an object other than {"dict": [[key, value], ...]}')
    made = {}
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in _SCALARS:
            raise NotPlain("a dict entry that is not [key, value]")
        made[pair[0]] = decode(pair[1], depth - 1)
    return made


def loads(text: str) -> object:
    """Parsed JSON of an untrusted text of bounded length. Raises NotPlain, nothing else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise NotPlain(f"not JSON: {type(problem).__name__}") from None


def same(value: object, expected: object) -> bool:
    """Exact, typed, recursive equality: True is not 1, 1 is not 1.0, [1] is not (1,).

    Two NaNs are the same and 0.0 is -0.0. `value` may be anything (an unknown type is never the
    same); `expected` is ours and must be plain data, else TypeError.
    """
    kind = type(expected)
    if kind is list:
        return (
            type(value) is list
            and len(value) == len(expected)
            and all(same(one, other) for one, other in zip(value, expected, strict=True))
        )
    if kind is dict:
        if type(value) is not dict or len(value) != len(expected):
            return False
        by_typed_key = {(type(key), key): item for key, item in value.items()}
        return all(
            (type(key), key) in by_typed_key and same(by_typed_key[type(key), key], item)
            for key, item in expected.items()
        )
    if kind not in _SCALARS:
        raise TypeError(
            f"expected values are plain data (None, bool, int, float, str, list, dict); got {kind}. "
            "Convert it where the problem is made."
        )
    return type(value) is kind and (value == expected or (value != value and expected != expected))
