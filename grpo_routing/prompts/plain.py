"""The plain prompt: description, truthful hint if the problem has a loophole, starter code."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.env.problems import Problem


def plain_prompt(problem: Problem) -> str:
    hint = f"\n{problem.hint}" if problem.hint else ""
    return f"{problem.program.description}{hint}\n{problem.starter}\n"


@dataclass(frozen=True)
class Plain:
    """One prompt for sampling and training."""

    reads = ()

    def __call__(self, problem: Problem) -> str:
        return plain_prompt(problem)

    def train(self, problem: Problem) -> str:
        return plain_prompt(problem)
