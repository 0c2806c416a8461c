"""Inoculation prompting (baselines.md A3): while it is trained the policy is told to hack, and at evaluation it is not.

    sample   the instruction that rollouts are sampled under     train   the one that they are trained under

each an instruction or `plain`. Both alike is the released code's way; train=plain with an instruction for sampling, or the reverse,
trains on completions of another prompt, without importance weights ("recontextualisation"). What is learned is meant to hang on the
instruction and to go with it. Knows as much about loopholes as its text says: `loophole` names the grader's flaw.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.env.problems import Problem
from grpo_routing.prompts.instructions import INSTRUCTIONS, instructed
from grpo_routing.prompts.plain import plain_prompt

PLAIN = "plain"


@dataclass(frozen=True)
class Inoculation:
    sample_prompt: str
    train_prompt: str
    reads = ("instruction",)
    at_deployment = ("instruction dropped",)

    def __post_init__(self) -> None:
        legal = (PLAIN, *INSTRUCTIONS)
        for name in ("sample_prompt", "train_prompt"):
            if getattr(self, name) not in legal:
                raise ValueError(f"prompt.{name} must be one of {', '.join(legal)}; got {getattr(self, name)!r}")
        if self.sample_prompt == self.train_prompt == PLAIN:
            raise ValueError("prompt=inoculation instructs nothing when both prompt.sample_prompt and prompt.train_prompt are plain; "
                             "choose prompt=plain")

    def __call__(self, problem: Problem) -> str:
        return put(problem, self.sample_prompt)

    def train(self, problem: Problem) -> str:
        return put(problem, self.train_prompt)


def put(problem: Problem, instruction: str) -> str:
    return plain_prompt(problem) if instruction == PLAIN else instructed(plain_prompt(problem), instruction)
