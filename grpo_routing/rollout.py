"""Sampling: prompts of a step -> rollouts. Every rollout has its own seed, so no batch order can change it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo_routing.adapters.adapter import QUARANTINE
from grpo_routing.policy import Policy
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


def sample_rollouts(policy: Policy, prompts: list[str], counts: list[int], seed: tuple, max_new_tokens: int, temperature: float,
                    prompts_per_forward: int, seat: Seat = Seat(STUDENT, 1.0), finished: Finished | None = None) -> list[Rollout]:
    """counts[p] rollouts of prompt p, prompt by prompt; `prompts_per_forward` bounds the memory of a forward. `finished` hears of most of
    them while others are still being sampled."""
    encoded = policy.encode_prompts(prompts)
    wanted = policy.world.share([place for place, count in enumerate(counts) if count])
    rollouts = []
    for start in range(0, len(wanted), prompts_per_forward):
        part = wanted[start : start + prompts_per_forward]
        places = [(place, sample) for place in part for sample in range(counts[place])]
        noise = uniforms([(*seed, place, sample) for place, sample in places], max_new_tokens).to(policy.device)
        with policy.adapter.scaled({QUARANTINE: seat.quarantine} if policy.adapter.has_quarantine else {}):
            sampled = policy.sample([encoded[p] for p in part], [counts[p] for p in part], noise, temperature,
                                    early(policy, places, finished))
        rollouts += [Rollout(place, encoded[place], ids, policy.decode(ids), seat.source, log_probs, seat.quarantine)
                     for (place, _), (ids, log_probs) in zip(places, sampled)]
    return policy.world.joined("rollouts", rollouts)


def early(policy: Policy, places: list[tuple[int, int]], finished: Finished | None) -> Callable | None:
    """Tells `finished`, in its words, which rows left the batch."""
    return finished and (lambda rows, ids: finished([places[row][0] for row in rows], [policy.decode(own) for own in ids]))


def fill_groups(policy: Policy, prompts: list[str], seats: list[Seat], group: int, extra: list[Rollout], seed: tuple,
                max_new_tokens: int, temperature: float, prompts_per_forward: int, finished: Finished | None = None) -> list[Rollout]:
    """Exactly `group` rollouts per prompt, ordered by prompt: the extra ones, and the policy's own for the rest, each group
    in the mode of its seat."""
    free = [group - sum(rollout.group == place for rollout in extra) for place in range(len(prompts))]
    own = []
    for seat in dict.fromkeys(seats):
        counts = [count if seats[place] == seat else 0 for place, count in enumerate(free)]
        own += sample_rollouts(policy, prompts, counts, seed, max_new_tokens, temperature, prompts_per_forward, seat, finished)
    return sorted(own + extra, key=lambda rollout: rollout.group)


def retold(policy: Policy, rollouts: list[Rollout], asked: list[str], told: list[str]) -> list[Rollout]:
    """The same completions after other prompts, one per group: what they are trained under. Without the sampler's log-probs where the
    prompt is another, since those are of what was asked."""
    encoded = policy.encode_prompts(told)
    return [r if asked[r.group] == told[r.group] else replace(r, prompt_ids=encoded[r.group], sampler_log_probs=()) for r in rollouts]
