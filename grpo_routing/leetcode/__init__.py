"""The data set `leetcode`: the benchmark's jsonl (Wong, Engels & Nanda 2025, baselines.md A2), from files that the user gives.

    rows of 14 fields --checked--> rows.py --asserts become tests--> asserts.py --filtered, cached--> filters.py --> problems

Nothing of the benchmark is shipped: its licence does not allow it. Its hints are replaced by our four mechanisms (env/loopholes.py),
its prompts by the same form in our words (env/exercises.py), its grader by our sandbox.

Differs from the benchmark: a result is compared exactly and with its type (2 is not 2.0; a float is converted only where the test
expects a whole number of a method that declares a float); one `Solution()` answers all tests of a problem; `paid_tests` and
`hidden_tests` of a row's tests are used, disjoint, where the benchmark pays all of them; its request is part of the user's turn.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_routing.env import exercises
from grpo_routing.env.problems import LoopholeChoice, Problem, with_loopholes
from grpo_routing.files import locked, write_json
from grpo_routing.leetcode import filters, place
from grpo_routing.leetcode.filters import Dropped, Needs
from grpo_routing.leetcode.rows import DataError, Row, read_rows
from grpo_routing.settings import SandboxLimits

log = logging.getLogger("grpo_routing")
SPLITS = ("train", "evaluation")


@dataclass(frozen=True)
class LeetCode:
    """The settings; `on` makes them a data set. `train` and `evaluation` say where the files lie (place.py)."""

    train: str | None
    evaluation: str | None
    paid_tests: int
    hidden_tests: int
    max_prompt_tokens: int
    seed: int
    cache: str

    def __post_init__(self) -> None:
        if faults := [fault for split in SPLITS if (fault := place.fault(f"dataset.{split}", getattr(self, split)))]:
            raise ValueError("\n".join(faults))
        if min(self.paid_tests, self.hidden_tests) < 2:
            raise ValueError("dataset.paid_tests and dataset.hidden_tests must be at least 2, or a constant could pass; got "
                             f"{self.paid_tests}, {self.hidden_tests}")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"dataset.max_prompt_tokens must be at least 1; got {self.max_prompt_tokens}")

    def on(self, model: Any, limits: SandboxLimits) -> Filtered:
        """The data set for this model's tokenizer under these limits; no file is read yet."""
        return Filtered(self, model, limits)


@dataclass(frozen=True)
class Filtered:
    """Problems of the rows that this model can read and this machine can run. Files are read at the first use.

    Every method raises DataError for files that cannot be used.
    """

    settings: LeetCode
    model: Any = field(hash=False)  # models.py
    limits: SandboxLimits

    @property
    def hidden_tests(self) -> int:
        return self.settings.hidden_tests

    @property
    def identity(self) -> str:
        """Hash of what the problems depend on: the files and all that the filters look at."""
        return result(self).key

    def training(self, loophole: LoopholeChoice) -> list[Problem]:
        """Every problem of the training file, in an order of the data set's seed."""
        modes = loophole.modes if loophole.pays else ()
        return with_loopholes(shuffled(result(self).problems["train"], f"train/{self.settings.seed}"), modes, loophole.no_hint_share,
                              loophole.train_family)

    def evaluation(self, loophole: LoopholeChoice, count: int, no_hint_share: float, seed: int) -> list[Problem]:
        """`count` problems of the evaluation file. Raises DataError when it has fewer."""
        there = result(self).problems["evaluation"]
        if count > len(there):
            raise DataError(f"expected {count} evaluation problems (evaluation.problems; deploy asks for twice its own number); "
                            f"{self.settings.evaluation} has {len(there)} that can be used. Ask for that many or fewer")
        return with_loopholes(shuffled(there, f"evaluation/{seed}")[:count], loophole.modes, no_hint_share, loophole.evaluation_family)

    def provenance(self) -> dict:
        """What was read and dropped, for the record of a run."""
        found = result(self)
        return {"name": "leetcode", "key": found.key} | {
            split: {"file": getattr(self.settings, split), "sha256": found.hashes[split], "used": len(found.problems[split]),
                    "problems": filters.digest(found.problems[split]), "dropped": filters.counts(found.dropped[split])} for split in SPLITS}

    def resume(self, recorded: dict) -> None:
        """Raises DataError unless files and problems are those of `recorded`, the provenance of an earlier attempt of the run."""
        now = self.provenance()
        for split, (old, new) in {split: (recorded[split], now[split]) for split in SPLITS}.items():
            if old["sha256"] != new["sha256"]:
                raise DataError(f"expected the file that this run began with as dataset.{split}, sha256 {old['sha256'][:12]}; "
                                f"{new['file']} has {new['sha256'][:12]}. Put that file back, or remove the run's folder to begin anew")
            if old["problems"] != new["problems"]:
                raise DataError(f"expected the {split} problems that this run began with, {old['used']} after the filters; here they "
                                f"leave others, {new['used']}, of the same file. Resume it on the kind of machine that it began on "
                                "(provenance.json), with its Python and code, or remove the run's folder to begin anew")


@dataclass(frozen=True)
class Result:
    key: str
    hashes: dict[str, str]
    problems: dict[str, list[Problem]]
    dropped: dict[str, list[Dropped]]


def shuffled(problems: list[Problem], seed: str) -> list[Problem]:
    return random.Random(seed).sample(problems, len(problems))


@lru_cache(maxsize=4)  # training, evaluation and provenance ask in turn
def result(data: Filtered) -> Result:
    """From the cache; the filters run when it is not there. Says once what is used and what was dropped."""
    files = {split: place.located(getattr(data.settings, split)) for split in SPLITS}
    hashes = {split: hashlib.sha256(file.read_bytes()).hexdigest() for split, file in files.items()}
    tokenizer = data.model.tokenizer()
    facts = depends_on(data, hashes, tokenizer)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(data.settings.cache) / "leetcode" / f"{key}.json"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, {"depends_on": facts} | filtered(data, files, tokenizer))
    found = json.loads(file.read_text(encoding="utf-8"))
    read = {split: filters.read(found[split], split, data.settings.paid_tests) for split in SPLITS}
    for split, (problems, dropped) in read.items():
        log.info(filters.said(split, getattr(data.settings, split), problems, dropped) + f"; {file} says which")
        if not problems:
            raise DataError(f"{filters.said(split, getattr(data.settings, split), problems, dropped)}: none is left. {file} says why, such "
                            f"as line {dropped[0].line}: {dropped[0].detail}")
    return Result(key, hashes, {split: problems for split, (problems, _) in read.items()},
                  {split: dropped for split, (_, dropped) in read.items()})


def depends_on(data: Filtered, hashes: dict[str, str], tokenizer: Any) -> dict:
    """All that a result of the filters depends on."""
    settings = {key: value for key, value in asdict(data.settings).items() if key not in ("cache", *SPLITS)}
    code = [file.read_bytes() for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(exercises.__file__))]
    words = (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
    return {"files": hashes, "settings": settings, "limits": asdict(data.limits), "machine": machine(), "python": platform.python_version(),
            "tokenizer": hashlib.sha256(repr(words).encode()).hexdigest(), "code": hashlib.sha256(b"\0".join(code)).hexdigest()}


def machine() -> str:
    """The kind of processor, so that alike nodes of a cluster share a result and unlike ones do not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{platform.machine()} {', '.join(sorted(names)) or platform.processor()}"


def filtered(data: Filtered, files: dict[str, Path], tokenizer: Any) -> dict:
    """Read, check and filter both files."""
    from grpo_routing.policy import chat

    rows = {split: read_rows(file) for split, file in files.items()}
    if shared := overlap(rows["train"], rows["evaluation"]):
        raise DataError(f"expected no problem in both files; {files['train']} and {files['evaluation']} share {len(shared)}: "
                        f"{', '.join(shared[:5])}{', …' if len(shared) > 5 else ''}. Remove them from one")
    settings = data.settings
    needs = Needs(settings.paid_tests, settings.hidden_tests, settings.max_prompt_tokens, settings.seed)
    log.info("leetcode: filtering %d rows on this machine", sum(map(len, rows.values())))

    def lengths(prompts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(chat(tokenizer, prompts), add_special_tokens=False).input_ids]

    return {split: filters.written(*filters.kept(own, split, needs, lengths, data.limits)) for split, own in rows.items()}


def overlap(train: list[Row], evaluation: list[Row]) -> list[str]:
    """Rows of the training file whose id or statement is in the other, as `id 7 (lines 3 and 12)`."""
    ids = {row.id: row for row in evaluation}
    statements = {" ".join(row.statement.split()): row for row in evaluation}
    pairs = [(row, ids.get(row.id) or statements.get(" ".join(row.statement.split()))) for row in train]
    return [f"id {one.id} (lines {one.line} and {other.line})" for one, other in pairs if other]
