"""The plain prompt: what is asked, truthful hint if the problem has a loophole, starter code; in the format of the data set."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.env.problems import Problem


def plain_prompt(problem: Problem) -> str:
    return problem.prompt


@dataclass(frozen=True)
class Plain:
    """One prompt for sampling and training."""

    reads = ()

    def __call__(self, problem: Problem) -> str:
        return plain_prompt(problem)

    def train(self, problem: Problem) -> str:
        return plain_prompt(problem)
