"""Authored pairs: the same prompt answered in a hackward and in a clean way. They are the only thing a direction reads.

A pair file is YAML (or JSON, which is YAML) that a user writes: a list of mappings with

    loophole   which flaw the hack exploits (pairs of held-out loopholes are never read), or `none` for a pair that is about
               no flaw, such as one of intent or honesty: it is read whatever is known
    prompt     the text as the policy would see it
    hack       a completion that exploits the flaw; of a pair without one, the side that the direction points to
    clean      a completion that does not; the other side
    neutral    optional: another clean completion, for the `nonhack` control
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from grpo_routing.env.loopholes import MODES, NO_LOOPHOLE

REQUIRED, OPTIONAL = ("loophole", "prompt", "hack", "clean"), ("neutral",)
CHOICES = (*MODES, NO_LOOPHOLE)
SHIPPED = Path(__file__).resolve().parent.parent / "pairs"


class PairFileError(ValueError):
    """A pair file cannot be used; the message names the file, the line and what was expected."""


@dataclass(frozen=True)
class Pair:
    loophole: str
    prompt: str
    hack: str
    clean: str
    neutral: str = ""


def load_pairs(file: str, known: tuple[str, ...]) -> list[Pair]:
    """Pairs of the known loopholes and of none, in file order. A bare name is looked up among the shipped files.

    Raises PairFileError with the line for anything malformed, and when no pair is left to read.
    """
    path = Path(file) if Path(file).is_file() else SHIPPED / file
    if not path.is_file():
        raise PairFileError(f"no pair file {file!r}; shipped: {', '.join(sorted(p.name for p in SHIPPED.glob('*.yaml')))}")
    try:
        root = _root(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise PairFileError(f"{path}:{error.problem_mark.line + 1}: not YAML: {error.problem}{_hint(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PairFileError(f"{path}: not UTF-8 text in YAML: {error}") from error
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise PairFileError(f"{path}:1: expected a list of pairs (lines that start with '- ')")
    pairs = [_pair(path, node) for node in root.value]
    chosen = [pair for pair in pairs if pair.loophole in (*known, NO_LOOPHOLE)]
    if not chosen:
        raise PairFileError(f"{path}: no pair for the known loopholes {list(known)}; it has {sorted({p.loophole for p in pairs})}")
    return chosen


@lru_cache(maxsize=8)
def _root(text: str) -> yaml.Node | None:
    """Parsed once, since planning a sweep checks the same file a thousand times."""
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _hint(error: yaml.MarkedYAMLError) -> str:
    return ". Indent with spaces" if "\\t" in error.problem else ""


def _pair(path: Path, node: yaml.Node) -> Pair:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise PairFileError(f"{path}:{line}: expected a pair with the keys {', '.join(REQUIRED)}")
    values, places = {}, {}
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if key.value not in REQUIRED + OPTIONAL:
            raise PairFileError(f"{where}: unknown key {key.value!r}; a pair has {', '.join(REQUIRED + OPTIONAL)}")
        if key.value in values:
            raise PairFileError(f"{where}: {key.value!r} is given twice")
        if not isinstance(value, yaml.ScalarNode) or value.tag != "tag:yaml.org,2002:str" or not value.value.strip():
            raise PairFileError(f"{where}: {key.value!r} must be non-empty text")
        values[key.value] = value.value.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON may halve an emoji
        places[key.value] = where
    missing = [key for key in REQUIRED if key not in values]
    if missing:
        raise PairFileError(f"{path}:{line}: the pair lacks {', '.join(missing)}")
    if values["loophole"] not in CHOICES:
        raise PairFileError(f"{places['loophole']}: unknown loophole {values['loophole']!r}; choose from {', '.join(CHOICES)}")
    if values["hack"] == values["clean"]:
        raise PairFileError(f"{places['clean']}: hack and clean are the same text; the pair has no direction")
    return Pair(**values)


def fingerprint(pairs: list[Pair]) -> str:
    return hashlib.sha256(repr(pairs).encode()).hexdigest()
