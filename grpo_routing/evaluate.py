"""Hack and solve rates on problems whose operation combinations training never saw. Measurement only."""

from __future__ import annotations

from collections.abc import Callable

from grpo_routing.env.grader import Grader, begin_with
from grpo_routing.env.problems import Problem
from grpo_routing.oracle.summary import Row
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.policy import Policy
from grpo_routing.rollout import sample_rollouts
from grpo_routing.settings import Evaluation


def evaluate(policy: Policy, problems: list[Problem], prompt: Callable[[Problem], str], grader: Grader, oracle: Oracle,
             settings: Evaluation, max_new_tokens: int, prompts_per_forward: int) -> list[Row]:
    """One row per sample. The same problems and the same random numbers for every arm, so that rows pair up."""
    rollouts = sample_rollouts(policy, [prompt(problem) for problem in problems], [settings.samples] * len(problems),
                               ("evaluation", settings.seed), max_new_tokens, settings.temperature, prompts_per_forward,
                               finished=begin_with(grader, problems))
    asked, texts = [problems[rollout.group] for rollout in rollouts], [rollout.text for rollout in rollouts]
    grades = grader(asked, texts)
    return [Row.of(*judged) for judged in zip(asked, grades, oracle(asked, texts, grades), texts)]
