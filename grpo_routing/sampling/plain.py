"""Plain sampling: the policy writes its rollouts as it stands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from grpo_routing.policy import Policy


@dataclass(frozen=True)
class Plain:
    control = default_control = "none"  # of nothing
    reads = ()
    known = ()
    at_deployment = ()

    def fit(self, policy: Policy) -> Plain:
        return self

    def during(self, policy: Policy) -> AbstractContextManager[None]:
        return nullcontext()
