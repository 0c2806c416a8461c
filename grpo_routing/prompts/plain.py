"""The plain prompt: description, truthful hint if the problem has a loophole, starter code."""

from __future__ import annotations

from grpo_routing.env.problems import Problem


def plain_prompt(problem: Problem) -> str:
    hint = f"\n{problem.hint}" if problem.hint else ""
    return f"{problem.program.description}{hint}\n{problem.starter}\n"
