"""What a policy learns beside the task: a gradient of its own that joins the deployed block's, and numbers about it.

It joins after the projection, since what is removed or routed is a part of the *task's* gradient, and it joins the natural sum as well, so
that split_moment's second moment knows of it. Rewards, advantages and labels never see it.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_routing.projections.subspace import Update


@dataclass(frozen=True)
class Aside:
    update: Update  # block -> module -> gradient [D]; empty: nothing was learned
    facts: dict[str, float]  # names in log.py

    def added(self, update: Update) -> Update:
        """The sum, block by block and module by module. Nothing added changes no bit."""
        joined = {block: {} for block in self.update} | update  # a block that the task leaves alone has this alone
        for block, own in self.update.items():
            task = joined[block]
            joined[block] = task | {name: task[name] + flat if name in task else flat for name, flat in own.items()}
        return joined

    def taking_part(self, participation: dict[str, float]) -> dict[str, float]:
        """Shares of the rollouts that train a block; one that no rollout trains is trained by this alone, and wholly."""
        return dict.fromkeys(self.update, 1.0) | participation


NOTHING = Aside({}, {})
