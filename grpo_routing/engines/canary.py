"""Does an engine serve the policy that is trained? Two questions to the log-probs that it reports, at every step.

    gap       mean |s - n|                            s reported, n the trainer's, of the same tokens: at most `tolerance`
    update    a = <s - b, n - b> / |n - b|^2          b the trainer's with an earlier adapter: 1 is the present policy, 0 the earlier one

A gap alone would pass for an engine that stands still while steps are small. The earlier adapter is the last one that a served update was
seen to leave behind, so a step that is too small to tell from rounding (standard error of a above CLEAR) is not forgotten but added to the
next. Before the first step the engine serves an adapter moved at random: it must follow there and back, so that rollouts of the base model,
as in small-rl (graft.md 1.12), end the run before anything is learned from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import generator_for
from grpo_routing.policy import Left, Policy, Sampled
from grpo_routing.rollout import Engine
from grpo_routing.types import TokenBatch

AUTO = "auto"
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the mean gap, in nats
CLEAR = 0.1
MOVE = 0.1  # nats a token, between the adapter and the one that is served before the first step
PROBE_TOKENS = 32  # of a completion before the first step

State = dict[str, Tensor]  # an adapter's parameters
Sequence = tuple[tuple[int, ...], tuple[int, ...]]  # prompt, completion


class NotServed(RuntimeError):
    """An engine does not serve the policy that is trained."""


@dataclass(frozen=True)
class Canary:
    checked: int  # rollouts of a batch that are compared
    tolerance: float | str  # of the mean gap, in nats; auto: by the model's precision, TOLERANCES

    def __post_init__(self) -> None:
        if self.checked < 1:
            raise ValueError(f"rollout.canary.checked must be at least 1; got {self.checked}")
        if (isinstance(self.tolerance, str) and self.tolerance != AUTO) or (not isinstance(self.tolerance, str) and self.tolerance <= 0):
            raise ValueError(f"rollout.canary.tolerance must be auto or a positive number of nats; got {self.tolerance!r}")

    def over(self, engine: Engine, name: str, policy: Policy) -> Watched:
        """Raises ValueError for a policy in several processes."""
        if policy.world.size > 1:
            raise ValueError(f"rollout={name} serves a run in one process, and this one has {policy.world.size}; use rollout=own")
        return Watched(engine, name, self.checked, TOLERANCES[policy.model.dtype] if self.tolerance == AUTO else self.tolerance)


class Watched:
    """An engine with its canary."""

    def __init__(self, engine: Engine, name: str, checked: int, tolerance: float) -> None:
        self.engine, self.name, self.checked, self.tolerance = engine, name, checked, tolerance
        self.earlier: State | None = None
        self.left: State | None = None  # will be the earlier one at the next step
        self.gaps: list[Tensor] = []
        self.updates: list[float] = []

    def sample(self, policy: Policy, prompts: list[tuple[int, ...]], counts: list[int], names: list[tuple], max_new_tokens: int,
               temperature: float, at_once: int, left: Left | None = None) -> list[Sampled]:
        """As the engine's, and nothing is told before all of it was compared. Raises NotServed."""
        if not prompts:
            return []
        if self.earlier is None:
            self.earlier = self.probed(policy, prompts[: self.checked], names[0], min(max_new_tokens, PROBE_TOKENS), temperature, at_once)
        sampled = self.engine.sample(policy, prompts, counts, names, max_new_tokens, temperature, at_once)
        asked = [prompt for prompt, count in zip(prompts, counts) for _ in range(count)]
        spread = range(0, len(asked), math.ceil(len(asked) / self.checked))
        gap, update = self.compared(policy, [asked[row] for row in spread], [sampled[row] for row in spread], self.earlier)
        self.gaps.append(gap)
        if update is not None:
            self.updates.append(update)
            self.left = copied(policy)
        return sampled

    def facts(self) -> dict[str, float]:
        """And the step is over."""
        gaps, updates, left = torch.cat(self.gaps), self.updates, self.left
        self.gaps, self.updates, self.left = [], [], None
        self.earlier = left or self.earlier
        said = {"rollout/served_gap": float(gaps.mean()), "rollout/served_gap_max": float(gaps.max())}
        return said | ({"rollout/served_update": min(updates)} if updates else {})

    def probed(self, policy: Policy, prompts: list[tuple[int, ...]], name: tuple, max_new_tokens: int, temperature: float,
               at_once: int) -> State:
        """Let the engine serve another adapter, and return it."""
        present, other = copied(policy), self.moved(policy, prompts)
        names = [(*name, "canary", place) for place in range(len(prompts))]
        policy.adapter.load_state(other)
        try:
            sampled = self.engine.sample(policy, prompts, [1] * len(prompts), names, max_new_tokens, temperature, at_once)
            _, update = self.compared(policy, prompts, sampled, present)
        finally:
            policy.adapter.load_state(present)
        if update is None:
            raise NotServed(f"rollout={self.name} reports log-probs too rough to tell an adapter from one that differs by {MOVE} nats a "
                            "token; look at its precision, or use rollout=own")
        return other

    def moved(self, policy: Policy, prompts: list[tuple[int, ...]]) -> State:
        """The present adapter plus noise, doubled until the prompts' own tokens tell the two apart."""
        present = copied(policy)
        own = [(prompt[:1], prompt[1:]) for prompt in prompts]
        before = log_probs(policy, own)
        noise = {key: torch.randn(value.shape, generator=generator_for("canary", key)).to(value) for key, value in present.items()}
        for doubled in range(32):
            other = {key: value + 2.0**doubled * 1e-3 * noise[key] for key, value in present.items()}
            policy.adapter.load_state(other)
            difference = float((log_probs(policy, own) - before).abs().mean())
            policy.adapter.load_state(present)
            if difference > MOVE:
                return other
        raise NotServed(f"the canary of rollout={self.name} found no adapter that changes the log-probs of {len(own)} prompts; are they "
                        "empty, or is every block switched off? Use rollout=own")

    def compared(self, policy: Policy, prompts: list[tuple[int, ...]], sampled: list[Sampled],
                 earlier: State) -> tuple[Tensor, float | None]:
        """|s - n| of every token, and the update where it can be seen. Raises NotServed, FloatingPointError for a policy that diverged."""
        sequences = [(prompt, ids) for prompt, (ids, _) in zip(prompts, sampled)]
        served, now = torch.tensor([one for _, said in sampled for one in said]), log_probs(policy, sequences)
        if not bool(torch.isfinite(now).all()):
            raise FloatingPointError("the policy gives log-probs that are not finite; its parameters have diverged. Lower optimizer.lr")
        present = copied(policy)
        policy.adapter.load_state(earlier)
        try:
            before = log_probs(policy, sequences)
        finally:
            policy.adapter.load_state(present)
        gap, update = (served - now).abs(), update_served(served, before, now)
        if update is not None and not update >= 0.5:
            raise NotServed(f"rollout={self.name} did not follow the adapter: its log-probs of {len(served)} tokens lie at {update:.2f} "
                            f"on the way from an earlier adapter (0) to the present one (1), mean gap {gap.mean():.2g} nats. It serves "
                            "old weights, the base model, or a prefix cache of old weights: look at how "
                            f"grpo_routing/engines/{self.name}.py hands weights over, or use rollout=own")
        if not float(gap.mean()) <= self.tolerance:
            raise NotServed(f"rollout={self.name} reports log-probs that differ from the trainer's by {gap.mean():.2g} nats on average "
                            f"(largest {gap.max():.2g}) over {len(served)} tokens; rollout.canary.tolerance is {self.tolerance:g}. Look at "
                            "precision and attention of both (model.dtype, model.attn_implementation), at top-k, top-p and temperature of "
                            "the server, and at whether it has the present weights; or use rollout=own")
        return gap, update


def update_served(served: Tensor, before: Tensor, now: Tensor) -> float | None:
    """Where the served log-probs [n] lie between those before (0) and now (1), least squares; None where rounding hides the difference."""
    change = now - before
    room = float(change.square().sum())
    if room == 0:
        return None
    share = float((served - before) @ change) / room
    rest = (served - before - share * change).square().mean()
    return share if math.sqrt(float(rest) / room) <= CLEAR else None


@torch.no_grad()
def log_probs(policy: Policy, sequences: list[Sequence]) -> Tensor:
    """The trainer's own of every completion token, one sequence after the other, [n] on the CPU."""
    tokens = TokenBatch.of(sequences, policy.pad, policy.device)
    return policy.log_probs(tokens)[tokens.completion_mask].float().cpu()


def copied(policy: Policy) -> State:
    return {key: value.clone() for key, value in policy.adapter.state().items()}
