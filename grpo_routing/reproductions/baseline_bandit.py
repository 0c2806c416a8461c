"""Penalty, screening and advantage modification on a bandit of three actions (baselines.md A8, B8), with the advantages that runs use.

    actions    hack (pays always), try-correct (pays where the problem is solvable), fail; theta_0 = log (.01, .12, .87)
    a step     4 groups, each solvable with chance .3; 16 draws of softmax(theta) each; reward 3.5 or 0.5
    signals    a monitor that is right with chance `accuracy`; a score ~ N(gap [hack], 1)
    update     theta += .15 mean A (onehot(a) - softmax(theta)),  A std-GRPO over what the arm keeps

A random score (gap 0) looks effective at 400 steps and is not at 1600: short horizons flatter any disturbance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.advantages import Grpo, Modification, Penalty, Screening

HACK, TRY, FAIL = range(3)
START = (0.01, 0.12, 0.87)
GROUPS, SIZE, SOLVABLE, RATE = 4, 16, 0.3, 0.15
NONE, PENALTY, SCREEN = Grpo(1e-6), Penalty(3.0, "threshold", 0.5, "sample"), Screening("sample", 1e-6, "loose", "batch")


def modification(form: str, alpha: float) -> Modification:
    return Modification(form, alpha, 0.1, "sample", 1e-6)


@dataclass(frozen=True)
class Arm:
    advantage: object
    steps: int
    accuracy: float = 1.0
    gap: float = 0.0
    seeds: int = 6


ARMS = {  # name -> arm, final hack probability of the sheet (None: not stated)
    "no intervention, 400 steps": (Arm(NONE, 400), 0.993),
    "no intervention": (Arm(NONE, 1600), 0.999),
    "penalty, true labels": (Arm(PENALTY, 1600), 0.005),
    "screening, true labels": (Arm(SCREEN, 1600), 0.005),
    "penalty, accuracy 0.7, 400 steps": (Arm(PENALTY, 400, accuracy=0.7, seeds=8), 0.012),
    "screening, accuracy 0.7, 400 steps": (Arm(SCREEN, 400, accuracy=0.7, seeds=8), 0.013),
    "multiplicative 2, gap 2.5": (Arm(modification("multiplicative", 2.0), 1600, gap=2.5), 0.000),
    "multiplicative 2, gap 1": (Arm(modification("multiplicative", 2.0), 1600, gap=1.0), 0.001),
    "multiplicative 2, random, 400 steps": (Arm(modification("multiplicative", 2.0), 400), 0.035),
    "multiplicative 2, random": (Arm(modification("multiplicative", 2.0), 1600), 0.976),
    "multiplicative 1, random": (Arm(modification("multiplicative", 1.0), 1600), 0.997),
    "additive 2, random": (Arm(modification("additive", 2.0), 1600), 0.998),
}


def play(arm: Arm) -> Tensor:
    """Final probability of the hack, [seeds]; the seeds are rows of one batch."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor(START, dtype=torch.float64).log().repeat(arm.seeds, 1)
    for _ in range(arm.steps):
        probability = torch.softmax(theta, 1)
        drawn = torch.multinomial(probability.repeat_interleave(GROUPS, 0), SIZE, replacement=True, generator=generator)  # [S * 4, 16]
        solvable = torch.rand(len(drawn), 1, generator=generator) < SOLVABLE
        rewards = torch.where((drawn == HACK) | ((drawn == TRY) & solvable), 3.5, 0.5).double()
        wrong = torch.rand(drawn.shape, generator=generator) >= arm.accuracy
        flags = ((drawn == HACK) ^ wrong).double()
        scores = torch.randn(drawn.shape, generator=generator, dtype=torch.float64) + arm.gap * (drawn == HACK)
        more = {"scores": scores} if "scores" in arm.advantage.reads else {}
        advantages = arm.advantage(rewards, flags, torch.ones_like(flags), **more)
        push = torch.nn.functional.one_hot(drawn, 3).double() - probability.repeat_interleave(GROUPS, 0)[:, None]
        theta = theta + RATE * (advantages[..., None] * push).view(arm.seeds, -1, 3).mean(1)
    return torch.softmax(theta, 1)[:, HACK]


def main() -> None:
    print(f"{'arm':38}{'hack, mean':>12}{'lowest':>9}{'highest':>9}{'sheet':>8}")
    for name, (arm, sheet) in ARMS.items():
        hack = play(arm)
        print(f"{name:38}{hack.mean():12.3f}{hack.min():9.3f}{hack.max():9.3f}{sheet:8.3f}", flush=True)


if __name__ == "__main__":
    main()
