"""Settings that are plain numbers: each class is the shape of one config group. conf/ says what the numbers mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reward:
    format_reward: float
    pass_reward: float


@dataclass(frozen=True)
class SandboxLimits:
    workers: int
    wall_seconds: float
    cpu_seconds: int
    memory_mb: int
    minimum: str


@dataclass(frozen=True)
class Evaluation:
    """`problems` of the evaluation split with `samples` completions each; `no_hint_share` of them disclose nothing."""

    problems: int
    samples: int
    no_hint_share: float
    temperature: float
    every: int
    seed: int
