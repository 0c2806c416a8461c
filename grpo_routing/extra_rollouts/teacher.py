"""Teacher rollouts: a frozen pool of graded completions takes a share of every group (the seeds' mixed groups).

This is imitation: the policy is pushed towards text that it did not write, and a hack rate reached this way says
nothing about discovery. Every table flags it. `python -m grpo_routing.teacher_pool` builds a pool.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_routing.extra_rollouts.aside import NOTHING, Aside
from grpo_routing.mask_sources.view import StepView
from grpo_routing.policy import Policy
from grpo_routing.types import TEACHER, Labels, Rollout

if TYPE_CHECKING:
    from grpo_routing.train import Trainer


@dataclass(frozen=True)
class Teacher:
    """`mix_ratio` of each group comes from `pool` (a JSONL file). `known` restricts which loopholes' rollouts it may show."""

    pool: str
    mix_ratio: float
    known: tuple[str, ...]
    imitation = True
    groups = 0
    reads = ("the pool's answers",)

    def __post_init__(self) -> None:
        if not 0 < self.mix_ratio < 1:
            raise ValueError(f"extra_rollouts.mix_ratio must lie between 0 and 1; got {self.mix_ratio}. Use extra_rollouts=none for 0")
        if not Path(self.pool).exists():
            raise ValueError(f"no teacher pool at {self.pool}; build it with `python -m grpo_routing.teacher_pool`")

    @cached_property
    def by_prompt(self) -> dict[str, list[str]]:
        """prompt -> completions, in file order."""
        table = defaultdict(list)
        for number, line in enumerate(Path(self.pool).read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            if missing := {"prompt", "completion", "loophole"} - row.keys():
                raise ValueError(f"{self.pool}:{number}: a teacher rollout needs {', '.join(sorted(missing))}")
            if row["loophole"] in self.known:
                table[row["prompt"]].append(row["completion"])
        if not table:
            raise ValueError(f"{self.pool} has no rollout of the known loopholes {list(self.known)}")
        return dict(table)

    def __call__(self, policy: Policy, prompts: list[str], group: int, seed: tuple) -> list[Rollout]:
        """Up to mix_ratio * group rollouts for each prompt of the pool; the policy fills the rest of every group.

        Raises ValueError when the share of a group rounds to none or all of it.
        """
        share = round(group * self.mix_ratio)
        if not 0 < share < group:
            raise ValueError(f"extra_rollouts.mix_ratio={self.mix_ratio} of a group of {group} gives {share} teacher rollouts; "
                             f"choose one between {0.5 / group:.3f} and {1 - 0.5 / group:.3f}")
        rollouts = []
        for place, (prompt, prompt_ids) in enumerate(zip(prompts, policy.encode_prompts(prompts))):
            known = self.by_prompt.get(prompt, [])
            rng = random.Random("/".join(map(str, (*seed, place))))
            for text in rng.sample(known, min(share, len(known))):
                ids = (*policy.encode(text), policy.end)
                rollouts.append(Rollout(place, prompt_ids, ids, text, TEACHER))
        return rollouts

    def edit(self, rollouts: list[Rollout], rewards: Tensor, labels: Labels) -> tuple[Tensor, Labels]:
        return rewards, labels

    def aside(self, view: StepView, trainer: Trainer, seed: tuple) -> Aside:
        return NOTHING
