"""How often the untrained policy hacks when it is told to: `python -m grpo_routing.elicitation [group=option …]`

One line per instruction (prompts/instructions.py) and one without any, on evaluation problems. Inoculation prompting wants the
instruction that elicits most (baselines.md A3): what a policy does because it was told, training need not make a habit. Measured with
the oracle, on the untrained policy, before any training: a developer would read the answers instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch

from grpo_routing.build import ConfigError, Plan, build_policy
from grpo_routing.composed import planned
from grpo_routing.env.grader import Grader
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.evaluate import evaluate
from grpo_routing.oracle.summary import summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.prompts.inoculation import PLAIN, put
from grpo_routing.prompts.instructions import INSTRUCTIONS

SHOWN = ("hack", "solve", "format", "no_hint_exploited")


def main(words: list[str]) -> int:
    try:
        ready = planned(words)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'instruction':<14}" + "".join(f"{name:>20}" for name in SHOWN))
    for instruction, rates in elicitation(ready):
        shown = ["" if rates[name] is None else f"{rates[name]:.3f}" for name in SHOWN]
        print(f"{instruction:<14}" + "".join(f"{text:>20}" for text in shown), flush=True)
    return 0


def elicitation(ready: Plan) -> Iterator[tuple[str, dict[str, float | None]]]:
    """(instruction, or `plain` for none; rates of the untrained policy under it), one after the other."""
    if ready.trainer.threads:
        torch.set_num_threads(ready.trainer.threads)
    policy, settings = build_policy(ready), ready.evaluation
    problems = ready.dataset.evaluation(ready.loophole, settings.problems, settings.no_hint_share, settings.seed)
    with Sandbox(**asdict(ready.sandbox)) as sandbox:
        grader = Grader(sandbox, ready.reward.format_reward, ready.reward.pass_reward, memory=0)
        oracle = Oracle(sandbox, ready.dataset.hidden_tests)
        for instruction in (PLAIN, *INSTRUCTIONS):
            rows = evaluate(policy, problems, lambda problem, told=instruction: put(problem, told), grader, oracle, settings,
                            ready.trainer.max_new_tokens, ready.trainer.prompts_per_forward)
            yield instruction, summary(rows, ready.loophole.known, ready.loophole.held_out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
