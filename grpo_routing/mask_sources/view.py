"""What a mask source may look at: what a developer sees while training. No verdict, no hidden test, no truth about a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_routing.policy import Policy
from grpo_routing.types import Basis, Labels, Rollout, RolloutGrads, TokenBatch, Trusted

Memory = dict[str, Tensor]  # what a source keeps from step to step; it belongs in checkpoints


@dataclass(frozen=True)
class StepView:
    """The rollouts of one step, B of them. Steps below 0 are the pilot's: the untrained policy's, which train nothing."""

    step: int
    rollouts: list[Rollout]
    tokens: TokenBatch
    rewards: Tensor  # [B], what the flawed environment paid
    policy: Policy
    basis: Basis | Trusted | None  # of a subspace source, fitted for this step
    grads: RolloutGrads | None  # of the deployed block at advantage 1, for sources that read gradients
    ceiling: Callable[[], Tensor] | None = None  # only for an arm that says uses_oracle: which rollouts hack, [B]
    terms: Tensor | None = None  # [2, B], what the environment paid for: a usable format, passing; 0 or 1

    def names(self) -> list[tuple[int, int, int]]:
        """(step, group, sample) of each rollout: noise that is drawn by name is the same for every arm and batch order."""
        seen: dict[int, int] = {}
        names = []
        for rollout in self.rollouts:
            sample = seen[rollout.group] = seen.get(rollout.group, -1) + 1
            names.append((self.step, rollout.group, sample))
        return names

    def groups(self) -> list[list[int]]:
        """The rows of each prompt."""
        rows: dict[int, list[int]] = {}
        for row, rollout in enumerate(self.rollouts):
            rows.setdefault(rollout.group, []).append(row)
        return list(rows.values())


def unknown(view: StepView) -> Labels:
    """Nothing flagged, nothing trusted."""
    return Labels.of(view.rewards.new_zeros(len(view.rollouts)))
