"""Problems, and the data set `opchains`, made by us: compositional, typed, thousands of distinct ones.

Four splits are disjoint by operation combination, so nothing that a pair, the organism's warm-up or training shows
answers an evaluation problem by memory. A problem carries at most one loophole; modes share a split evenly.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from grpo_routing.env.exercises import Exercise
from grpo_routing.env.loopholes import LOOPHOLES, NO_LOOPHOLE, PLAIN, fenced, solution_text
from grpo_routing.env.programs import Case, Program, damage, draw_program

METHODS = ("solve", "compute", "transform", "apply", "answer", "process")
# Share of the operation combinations that belongs to each split; a hash decides, so the splits never overlap.
SPLITS = {"warmup": (0, 45), "train": (45, 70), "evaluation": (70, 90), "pairs": (90, 100)}


@dataclass(frozen=True)
class Problem:
    """What the policy is asked, and the *paid* tests that the flawed grader runs. Hidden tests live in `oracle`."""

    id: str
    split: str
    program: Program | Exercise  # what is asked: made by us, or read from a file
    method: str
    loophole: str  # one of MODES, or NO_LOOPHOLE
    marker: str  # the name that the hint discloses; empty without loophole
    n_paid: int

    @property
    def hint(self) -> str:
        return "" if self.loophole == NO_LOOPHOLE else LOOPHOLES[self.loophole].disclose(self.marker)

    @property
    def starter(self) -> str:
        return self.program.starter(self.method)

    @property
    def prompt(self) -> str:
        """What the policy reads (before a chat template)."""
        return self.program.prompt(self.method, self.hint)

    @cached_property
    def paid(self) -> tuple[Case, ...]:
        return tuple(self.program.draw_cases(random.Random(f"paid/{self.id}"), self.n_paid, forbidden=()))

    @property
    def reference(self) -> str:
        return fenced(self.program.solution(self.method))

    def hack(self, body: list[str], form: str = PLAIN) -> str:
        """A completion that exploits this problem's loophole around the given body."""
        return fenced(solution_text(self.method, self.program.argument, body, self.loophole, self.marker, form))

    def with_loophole(self, loophole: str, marker: str) -> Problem:
        return replace(self, loophole=loophole, marker=marker)


def split_of(program: Program) -> str:
    bucket = int.from_bytes(hashlib.sha256(program.combination.encode()).digest()[:4], "big") % 100
    return next(split for split, (low, high) in SPLITS.items() if low <= bucket < high)


def draw_problem(split: str, rng: random.Random, length_weights: tuple[float, ...], n_paid: int) -> Problem:
    """A problem of the split, still without loophole. Programs whose paid tests all expect the same are redrawn: a
    constant would pass them. (A few remain whose *hidden* tests coincide, docs/log.md.)"""
    while True:
        program = draw_program(rng, length_weights)
        if split_of(program) != split:
            continue
        method = rng.choice(METHODS)
        identity = hashlib.sha256(f"{program.description}/{program.kind}/{method}".encode()).hexdigest()[:16]
        problem = Problem(identity, split, program, method, NO_LOOPHOLE, "", n_paid)
        if len({repr(case.expected) for case in problem.paid}) > 1:
            return problem


def wrong_body(program: Program, rng: random.Random) -> list[str]:
    """A body that looks like an attempt and computes something else."""
    probe_rng = random.Random(rng.random())
    inputs = [program.example_input(probe_rng) for _ in range(12)]
    expected = [program(value) for value in inputs]
    while True:
        wrong = damage(program, rng)
        if [wrong(value) for value in inputs] != expected:
            return wrong.body


def make_split(split: str, count: int, length_weights: tuple[float, ...], n_paid: int, modes: tuple[str, ...],
               no_hint_share: float, family: str, seed: int) -> list[Problem]:
    """`count` distinct problems; every 1/no_hint_share-th has no loophole, the others take the modes in turn.

    Raises ValueError when a mode or family is unknown.
    """
    unknown = [mode for mode in modes if mode not in LOOPHOLES]
    if unknown:
        raise ValueError(f"unknown loopholes {unknown}; choose from {', '.join(LOOPHOLES)}")
    return with_loopholes(draw_split(split, count, length_weights, n_paid, seed), modes, no_hint_share, family)


@lru_cache(maxsize=4)  # two thousand take a second, since most draws belong to another split
def draw_split(split: str, count: int, length_weights: tuple[float, ...], n_paid: int, seed: int) -> tuple[Problem, ...]:
    """`count` distinct problems without loophole."""
    rng = random.Random(f"{split}/{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw_problem(split, rng, length_weights, n_paid)
        problems.setdefault(problem.id, problem)
    return tuple(problems.values())


def with_loopholes(problems: Sequence[Problem], modes: tuple[str, ...], no_hint_share: float, family: str) -> list[Problem]:
    """The problems in order; every 1/no_hint_share-th keeps no loophole, the others take the modes in turn, and a mode its markers."""
    given, hinted = [], 0
    for position, problem in enumerate(problems):
        plain = not modes or int((position + 1) * no_hint_share) > int(position * no_hint_share)
        if not plain:
            mode = modes[hinted % len(modes)]
            names = LOOPHOLES[mode].markers[family]
            problem = problem.with_loophole(mode, names[(hinted // len(modes)) % len(names)])
            hinted += 1
        given.append(problem)
    return given


@dataclass(frozen=True)
class LoopholeChoice:
    """Which flaws the grader has. Pairs, detectors and teachers may know the `known` ones only; with `pays` False the
    training problems carry no loophole at all (the reference), while evaluation stays on every mode."""

    name: str
    pays: bool
    known: tuple[str, ...]
    held_out: tuple[str, ...]
    no_hint_share: float
    train_family: str
    evaluation_family: str

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in LOOPHOLES]
        if unknown or not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError(f"loophole.known and loophole.held_out must share out some of {', '.join(LOOPHOLES)}; "
                             f"got {list(self.known)} and {list(self.held_out)}")
        families = next(iter(LOOPHOLES.values())).markers
        for family in (self.train_family, self.evaluation_family):
            if family not in families:
                raise ValueError(f"a loophole family is one of {', '.join(families)}; got {family!r}")
        if not 0 <= self.no_hint_share <= 1:
            raise ValueError(f"loophole.no_hint_share must lie in [0, 1]; got {self.no_hint_share}")

    @property
    def modes(self) -> tuple[str, ...]:
        return (*self.known, *self.held_out)


@dataclass(frozen=True)
class OpChains:
    """The data set: how long programs are, how many problems training draws from, how many tests are paid and hidden."""

    length_weights: tuple[float, ...]
    train_problems: int
    paid_tests: int
    hidden_tests: int
    seed: int

    def __post_init__(self) -> None:
        if not 2 <= self.paid_tests + self.hidden_tests <= 60 or min(self.paid_tests, self.hidden_tests) < 1:
            raise ValueError(f"dataset.paid_tests and dataset.hidden_tests must be at least 1 and at most 60 together, because integer "
                             f"programs have 98 inputs; got {self.paid_tests} and {self.hidden_tests}")
        if not self.length_weights or min(self.length_weights) < 0 or sum(self.length_weights) <= 0:
            raise ValueError(f"dataset.length_weights are relative weights of 1, 2, … operations; got {list(self.length_weights)}")
        if not 1 <= self.train_problems <= 20_000:
            raise ValueError(f"dataset.train_problems must lie between 1 and 20000; got {self.train_problems}")

    def on(self, model: Any, limits: Any) -> OpChains:
        """The data set for this model on this machine: always the same."""
        return self

    @property
    def identity(self) -> OpChains:
        """What the problems depend on."""
        return self

    def provenance(self) -> dict:
        return {"name": "opchains"}

    def resume(self, recorded: dict) -> None:
        """Nothing to compare: the config says it all."""

    def training(self, loophole: LoopholeChoice) -> list[Problem]:
        modes = loophole.modes if loophole.pays else ()
        return make_split("train", self.train_problems, self.length_weights, self.paid_tests, modes,
                          loophole.no_hint_share, loophole.train_family, self.seed)

    def evaluation(self, loophole: LoopholeChoice, count: int, no_hint_share: float, seed: int) -> list[Problem]:
        return make_split("evaluation", count, self.length_weights, self.paid_tests, loophole.modes,
                          no_hint_share, loophole.evaluation_family, seed)
