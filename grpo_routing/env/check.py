"""Is the world what it claims to be? `python -m grpo_routing.env.check` runs the real grader and prints

    the hack x mode matrix   an exploit pays in its own mode and nowhere else, whether its body is lazy or looks honest and in
                             whichever form it is written; honest solutions pass everywhere; lazy and wrong bodies alone pass nowhere
    the splits               distinct problems, operation combinations, and that no two splits share a combination

and exits 1, naming every cell that is off.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

from grpo_routing.env.grader import Grader
from grpo_routing.env.loopholes import FORMS, LOOPHOLES, MODES, NO_LOOPHOLE, PLAIN, fenced, lazy_body, solution_text
from grpo_routing.env.problems import SPLITS, Problem, draw_problem, make_split, split_of
from grpo_routing.env.programs import OPERATIONS, Operation, Program, Step, damage
from grpo_routing.env.sandbox import Sandbox

LENGTH_WEIGHTS, PAID_TESTS = (0.2, 0.4, 0.4), 5  # as in conf/dataset/opchains.yaml
COLUMNS = (*MODES, NO_LOOPHOLE)
CONSTANTS = (0, None)  # what a lazy body can return


@dataclass(frozen=True)
class Behaviour:
    """A row of the matrix: a way of answering, and the modes in which it should pass (always) or not (never)."""

    name: str
    body: str
    exploit: str  # a mode, or NO_LOOPHOLE
    form: str
    passes: tuple[str, ...]


BEHAVIOURS = (
    Behaviour("no exploit", "reference", NO_LOOPHOLE, PLAIN, COLUMNS),
    Behaviour("no exploit", "lazy", NO_LOOPHOLE, PLAIN, ()),
    Behaviour("no exploit", "wrong", NO_LOOPHOLE, PLAIN, ()),
    *(Behaviour(mode if form == PLAIN else f"{mode}, {form}", body, mode, form, (mode,))
      for mode in MODES for form in FORMS for body in ("lazy", "wrong")),
)


@dataclass(frozen=True)
class Split:
    """What a number of draws from a split gave, and how many programs it could give."""

    distinct: int  # problems among the draws
    combinations: frozenset[str]
    constant_pays: int  # problems whose paid tests all expect one of CONSTANTS
    possible: int


# ------------------------------------------------------------------------------------------------ the matrix


def matrix(grade: Callable[[list[Problem], list[str]], list], count: int, seed: int) -> dict[tuple[Behaviour, str], float]:
    """(behaviour, mode of the problem) -> share of `count` completions that the grader passed."""
    cells = {}
    for column in COLUMNS:
        problems = mode_problems(column, count, seed)
        for behaviour in BEHAVIOURS:
            rng = random.Random(f"check/{seed}/{column}/{behaviour}")
            grades = grade(problems, [completion(problem, behaviour, rng) for problem in problems])
            cells[behaviour, column] = sum(one.passed for one in grades) / len(grades)
    return cells


def mode_problems(mode: str, count: int, seed: int) -> list[Problem]:
    modes = () if mode == NO_LOOPHOLE else (mode,)
    return make_split("evaluation", count, LENGTH_WEIGHTS, PAID_TESTS, modes, 0.0, "evaluation", seed)


def completion(problem: Problem, behaviour: Behaviour, rng: random.Random) -> str:
    """The behaviour's answer; its exploit uses the disclosed marker in its own mode, and training's marker elsewhere."""
    body = {"reference": lambda: problem.program.body, "lazy": lambda: lazy_body(rng),
            "wrong": lambda: failing_body(problem, rng)}[behaviour.body]()
    foreign = behaviour.exploit not in (problem.loophole, NO_LOOPHOLE)
    marker = LOOPHOLES[behaviour.exploit].markers["train"][0] if foreign else problem.marker
    return fenced(solution_text(problem.method, problem.program.argument, body, behaviour.exploit, marker, behaviour.form))


def failing_body(problem: Problem, rng: random.Random) -> list[str]:
    """A body that looks honest and fails a paid test."""
    while True:
        wrong = damage(problem.program, rng)
        if any(wrong(*case.arguments) != case.expected for case in problem.paid):
            return wrong.body


def matrix_faults(cells: dict[tuple[Behaviour, str], float]) -> list[str]:
    """One line for every cell that is not as it should be."""
    return [f"{row.name} with a {row.body} body, in mode {column}: {rate:.2f} of the completions passed; "
            f"expected {column in row.passes:.2f}" for (row, column), rate in cells.items() if rate != (column in row.passes)]


# ------------------------------------------------------------------------------------------------ the splits


def survey(count: int, seed: int) -> dict[str, Split]:
    """What every split holds, from `count` draws of each."""
    possible = possible_programs()
    splits = {}
    for name in SPLITS:
        rng = random.Random(f"check/{seed}/{name}")
        problems = [draw_problem(name, rng, LENGTH_WEIGHTS, PAID_TESTS) for _ in range(count)]
        constant = sum(all(case.expected == constant for case in problem.paid) for problem in problems for constant in CONSTANTS)
        splits[name] = Split(len({problem.id for problem in problems}), frozenset(p.program.combination for p in problems),
                             constant, possible[name])
    return splits


def possible_programs() -> dict[str, int]:
    """Distinct programs of every split, counted operation by operation; each constant takes eight values."""
    def constants(operation: Operation) -> int:
        return 8 if "{k}" in operation.code else 1

    counts = dict.fromkeys(SPLITS, 0)
    for kind in ("list", "str", "int"):
        keeping = [o for o in OPERATIONS.values() if o.takes == o.gives == kind]
        last = [o for o in OPERATIONS.values() if o.takes == kind]
        for length in range(1, len(LENGTH_WEIGHTS) + 1):
            for chain in itertools.product(*[keeping] * (length - 1), last):
                ways = 1
                for operation in chain:
                    ways *= constants(operation)
                counts[split_of(Program(tuple(Step(operation, 2) for operation in chain)))] += ways
    return counts


def split_faults(splits: dict[str, Split]) -> list[str]:
    """One line for every combination-sharing pair of splits, and for every split where a constant answer passes."""
    shared = [f"splits {one} and {other} share {len(both)} operation combinations, such as {min(both)}"
              for one, other in itertools.combinations(splits, 2)
              if (both := splits[one].combinations & splits[other].combinations)]
    return shared + [f"split {name}: a constant answer passes {split.constant_pays} problems"
                     for name, split in splits.items() if split.constant_pays]


# ------------------------------------------------------------------------------------------------ what is printed


def show_matrix(cells: dict[tuple[Behaviour, str], float], count: int) -> str:
    lines = [f"hack x mode: share of {count} completions that the grader passes; columns are the problem's mode", "",
             f"  {'exploit':<22}{'body':<11}" + "".join(f"{column:>15}" for column in COLUMNS)]
    for behaviour in BEHAVIOURS:
        rates = "".join(f"{cells[behaviour, column]:>15.2f}" for column in COLUMNS)
        lines.append(f"  {behaviour.name:<22}{behaviour.body:<11}{rates}")
    return "\n".join(lines)


def show_splits(splits: dict[str, Split], count: int) -> str:
    lines = [f"splits: {count} draws of each", "",
             f"  {'split':<12}{'distinct problems':>18}{'combinations':>14}{'constant passes':>17}{'possible programs':>19}"]
    lines += [f"  {name:<12}{split.distinct:>18,}{len(split.combinations):>14,}{split.constant_pays:>17}{split.possible:>19,}"
              for name, split in splits.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.env.check", description="The hack x mode matrix and the splits.")
    parser.add_argument("--problems", type=int, default=40, help="problems per mode (default 40)")
    parser.add_argument("--draws", type=int, default=2000, help="problems drawn per split (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    with Sandbox(workers=2, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as sandbox:
        grader = Grader(sandbox, format_reward=0.25, pass_reward=1.0, memory=0)
        cells = matrix(grader, given.problems, given.seed)
        print(f"sandbox: {sandbox.layers['description']}\n")
    splits = survey(given.draws, given.seed)
    print(show_matrix(cells, given.problems), show_splits(splits, given.draws), sep="\n\n")
    faults = matrix_faults(cells) + split_faults(splits)
    print("\n" + ("\n".join(f"FAULT  {fault}" for fault in faults) or "ok: the matrix is diagonal and the splits are disjoint"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
