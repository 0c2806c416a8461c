"""Sampling: prompts of a step -> rollouts. Every rollout has its own seed, so no batch order can change it.

Those that train may be written by another engine than the policy itself (engines/); everything else is sampled by the policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.policy import Left, Policy, Sampled
from grpo_routing.types import STUDENT, Rollout

Finished = Callable[[list[int], list[str]], None]  # prompts (places in the step) and completions that will not change any more


def named_seed(*name: object) -> int:
    """A 64-bit seed from a name such as (run seed, "rollout", step, prompt, sample); never one shared stream."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8], "big")


def uniforms(names: list[tuple], count: int) -> Tensor:
    """[len(names), count] numbers in [0, 1); each row depends on its own name only."""
    return torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(named_seed(*name))).random(count) for name in names]))


@dataclass(frozen=True)
class Seat:
    """Whose rollouts a group holds, and the forward scale of the quarantine when they are sampled and scored."""

    source: str
    quarantine: float


class Engine(Protocol):
    """Who writes rollouts. The line does not know which one does."""

    def sample(self, policy: Policy, prompts: list[tuple[int, ...]], counts: list[int], names: list[tuple], max_new_tokens: int,
               temperature: float, at_once: int, left: Left | None = None) -> list[Sampled]:
        """counts[p] completions of prompt p, prompt by prompt, by the policy as it stands, its blocks at their present scales.

        names [sum(counts)] name the random numbers of each; `at_once` bounds the prompts of a forward where nothing else does. `left` may
        hear of completions while others go on.
        """

    def facts(self) -> dict[str, float]:
        """Metrics of what was written since they were last asked for (log.py)."""


@dataclass(frozen=True)
class Own:
    """The policy's own decoder: every token from a uniform number of its rollout's name, so that it is written again bit for bit."""

    served = copies = tempers = False  # see engines/

    def start(self, policy: Policy) -> Own:
        return self

    def sample(self, policy: Policy, prompts: list[tuple[int, ...]], counts: list[int], names: list[tuple], max_new_tokens: int,
               temperature: float, at_once: int, left: Left | None = None) -> list[Sampled]:
        sampled, ahead = [], iter(names)
        for start in range(0, len(prompts), at_once):
            part, before = counts[start : start + at_once], len(sampled)
            noise = uniforms(list(islice(ahead, sum(part))), max_new_tokens).to(policy.device)
            told = left and (lambda rows, ids, before=before: left([before + row for row in rows], ids))
            sampled += policy.sample(prompts[start : start + at_once], part, noise, temperature, told)
        return sampled

    def facts(self) -> dict[str, float]:
        return {}


OWN = Own()


def sample_rollouts(policy: Policy, prompts: list[str], counts: list[int], seed: tuple, max_new_tokens: int, temperature: float,
                    prompts_per_forward: int, seat: Seat = Seat(STUDENT, 1.0), engine: Engine = OWN,
                    finished: Finished | None = None) -> list[Rollout]:
    """counts[p] rollouts of prompt p, prompt by prompt; `prompts_per_forward` bounds the memory of a forward. `finished` hears of most of
    them while others are still being sampled, where the engine tells."""
    encoded = policy.encode_prompts(prompts)
    wanted = policy.world.share([place for place, count in enumerate(counts) if count])
    places = [(place, sample) for place in wanted for sample in range(counts[place])]
    with policy.adapter.scaled({QUARANTINE: seat.quarantine} if policy.adapter.has_quarantine else {}):
        sampled = engine.sample(policy, [encoded[p] for p in wanted], [counts[p] for p in wanted], [(*seed, *place) for place in places],
                                max_new_tokens, temperature, prompts_per_forward, early(policy, places, finished))
    rollouts = [Rollout(place, encoded[place], ids, policy.decode(ids), seat.source, log_probs, seat.quarantine)
                for (place, _), (ids, log_probs) in zip(places, sampled, strict=True)]
    return policy.world.joined("rollouts", rollouts)


def early(policy: Policy, places: list[tuple[int, int]], finished: Finished | None) -> Left | None:
    """Tells `finished`, in its words, which rows left the batch."""
    return finished and (lambda rows, ids: finished([places[row][0] for row in rows], [policy.decode(own) for own in ids]))


def fill_groups(policy: Policy, prompts: list[str], seats: list[Seat], group: int, extra: list[Rollout], seed: tuple,
                max_new_tokens: int, temperature: float, prompts_per_forward: int, engine: Engine = OWN,
                finished: Finished | None = None) -> list[Rollout]:
    """Exactly `group` rollouts per prompt, ordered by prompt: the extra ones, and the policy's own for the rest, each group
    in the mode of its seat."""
    free = [group - sum(rollout.group == place for rollout in extra) for place in range(len(prompts))]
    own = []
    for seat in dict.fromkeys(seats):
        counts = [count if seats[place] == seat else 0 for place, count in enumerate(free)]
        own += sample_rollouts(policy, prompts, counts, seed, max_new_tokens, temperature, prompts_per_forward, seat, engine, finished)
    return sorted(own + extra, key=lambda rollout: rollout.group)


def retold(policy: Policy, rollouts: list[Rollout], asked: list[str], told: list[str]) -> list[Rollout]:
    """The same completions after other prompts, one per group: what they are trained under. Without the sampler's log-probs where the
    prompt is another, since those are of what was asked."""
    encoded = policy.encode_prompts(told)
    return [r if asked[r.group] == told[r.group] else replace(r, prompt_ids=encoded[r.group], sampler_log_probs=()) for r in rollouts]
