"""v_hack: the gradient that would make the model prefer the hacking persona's answer (vGROUT / grpo_proj2's extraction).

    row of a pair   grad NLL(hack) - grad NLL(clean), in the trained coordinates (dS for svd, the block for lora)

The row equals the single-step GRPO gradient of a perfectly labelled pair (advantage +1 for the hack, -1 for the clean
answer). Reads authored pairs of *known* loopholes only: no label of a rollout, no judge, no oracle.
Departure from the live loss: the NLL is a mean over tokens, the Dr.GRPO loss a sum over a constant, so short
completions weigh more here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grpo_routing.mask_sources.direction import DirectionSource, pair_differences
from grpo_routing.mask_sources.pairs import Pair
from grpo_routing.policy import Policy


@dataclass(frozen=True)
class PersonaGradient(DirectionSource):
    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        return pair_differences(policy, pairs, "hack", "clean", self.micro_batch)
