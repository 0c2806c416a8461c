"""Penalty, screening and advantage modification on a bandit of three or four actions (baselines.md A8, B8), with the advantages that
runs use.

    actions    hack (pays always), try-correct (pays where the problem is solvable), fail; theta_0 = log (.01, .12, .87)
    a fourth   correct + attempt: a true solution with the hack beside it, on the hack's logit; where the problem is not solvable it
               is a hack. Flags are of hacks (strict) or of every attempt (loose, as the released screening has it, A6)
    a step     4 groups, each solvable with chance .3; 16 draws of softmax(theta) each; reward 3.5 or 0.5
    signals    a monitor that is right with chance `accuracy`; a score ~ N(gap [hack], 1)
    update     theta += .15 mean A (onehot(a) - softmax(theta)),  A std-GRPO over what the arm keeps

A random score (gap 0) looks effective at 400 steps and is not at 1600: short horizons flatter any disturbance. The same holds for a
monitor of accuracy .7: the sheet's .012 is a delay. Screening is weaker than the penalty, but not for the fourth action, as A8
supposes: it breaks out where hacks are five times as likely at the start, with three actions as with four. What correct attempts
do is to carry hacks past the penalty too, if flags are strict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.advantages import Grpo, Modification, Penalty, Screening

HACK, TRY, FAIL, BOTH = range(4)
LOGIT = torch.tensor([HACK, TRY, FAIL, HACK])  # of each action: correct + attempt shares the hack's
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
    hacks: float = START[HACK]  # probability of a hack at the start; the difference is taken from fail
    attempts: float = 0.0  # the same of correct + attempt; 0: three actions
    label: str = "strict"  # or loose; the same thing with three actions

    def __post_init__(self) -> None:
        if self.label not in ("strict", "loose"):
            raise ValueError(f"label must be strict or loose; got {self.label!r}")


ARMS = {  # name -> arm, final hack probability of the sheet (None: not stated)
    "no intervention, 400 steps": (Arm(NONE, 400), 0.993),
    "no intervention": (Arm(NONE, 1600), 0.999),
    "penalty, true labels": (Arm(PENALTY, 1600), 0.005),
    "screening, true labels": (Arm(SCREEN, 1600), 0.005),
    "penalty, accuracy 0.7, 400 steps": (Arm(PENALTY, 400, accuracy=0.7, seeds=8), 0.012),
    "screening, accuracy 0.7, 400 steps": (Arm(SCREEN, 400, accuracy=0.7, seeds=8), 0.013),
    "penalty, accuracy 0.7": (Arm(PENALTY, 1600, accuracy=0.7), None),
    "screening, accuracy 0.7": (Arm(SCREEN, 1600, accuracy=0.7), None),
    "multiplicative 2, gap 2.5": (Arm(modification("multiplicative", 2.0), 1600, gap=2.5), 0.000),
    "multiplicative 2, gap 1": (Arm(modification("multiplicative", 2.0), 1600, gap=1.0), 0.001),
    "multiplicative 2, random, 400 steps": (Arm(modification("multiplicative", 2.0), 400), 0.035),
    "multiplicative 2, random": (Arm(modification("multiplicative", 2.0), 1600), 0.976),
    "multiplicative 1, random": (Arm(modification("multiplicative", 1.0), 1600), 0.997),
    "additive 2, random": (Arm(modification("additive", 2.0), 1600), 0.998),
}
ATTEMPTS = [(hacks, 0.0, accuracy, "strict") for hacks in (0.01, 0.05) for accuracy in (1.0, 0.9, 0.7)] + [
    (0.01, attempts, accuracy, label) for attempts in (0.01, 0.04) for accuracy in (1.0, 0.9, 0.7) for label in ("strict", "loose")]


def main() -> None:
    print(f"{'arm':38}{'hack, mean':>12}{'lowest':>9}{'highest':>9}{'sheet':>8}")
    for name, (arm, sheet) in ARMS.items():
        hack = play(arm)
        print(f"{name:38}{hack.mean():12.3f}{hack.min():9.3f}{hack.max():9.3f}{'-' if sheet is None else f'{sheet:.3f}':>8}", flush=True)
    print("\nhack after 1600 steps by the chances at the start of a hack and of correct + attempt, mean of 6 seeds [lowest, highest]")
    print(f"{'hack':>5}{'both':>6}{'accuracy':>10}  {'label':8}{'penalty':>22}{'screening':>22}")
    for hacks, attempts, accuracy, label in ATTEMPTS:
        ends = [play(Arm(rule, 1600, accuracy, hacks=hacks, attempts=attempts, label=label)) for rule in (PENALTY, SCREEN)]
        cells = "".join(f"{f'{hack.mean():.3f} [{hack.min():.3f}, {hack.max():.3f}]':>22}" for hack in ends)
        print(f"{hacks:5g}{attempts:6g}{accuracy:10g}  {label:8}{cells}", flush=True)


def play(arm: Arm) -> Tensor:
    """Final probability of a hack, [seeds]; the seeds are rows of one batch."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([arm.hacks, START[TRY], 1 - START[TRY] - arm.hacks - arm.attempts, arm.attempts], dtype=torch.float64)
    start = start[: 4 if arm.attempts else 3].log()
    logit = LOGIT[: len(start)]
    theta = torch.zeros(arm.seeds, 3, dtype=torch.float64)  # moved since the start
    for _ in range(arm.steps):
        probability = torch.softmax(start + theta[:, logit], 1)
        drawn = torch.multinomial(probability.repeat_interleave(GROUPS, 0), SIZE, replacement=True, generator=generator)  # [S * 4, 16]
        solvable = torch.rand(len(drawn), 1, generator=generator) < SOLVABLE
        attempt = logit[drawn] == HACK
        correct = ((drawn == TRY) | (drawn == BOTH)) & solvable
        rewards = torch.where(attempt | correct, 3.5, 0.5).double()
        wrong = torch.rand(drawn.shape, generator=generator) >= arm.accuracy
        flags = ((attempt if arm.label == "loose" else attempt & ~correct) ^ wrong).double()
        scores = torch.randn(drawn.shape, generator=generator, dtype=torch.float64) + arm.gap * (attempt & ~correct)
        more = {"scores": scores} if "scores" in arm.advantage.reads else {}
        advantages = arm.advantage(rewards, flags, torch.ones_like(flags), **more)
        push = torch.nn.functional.one_hot(drawn, len(start)).double() - probability.repeat_interleave(GROUPS, 0)[:, None]
        theta = theta.index_add(1, logit, RATE * (advantages[..., None] * push).view(arm.seeds, -1, len(start)).mean(1))
    probability = torch.softmax(start + theta[:, logit], 1)
    return probability[:, HACK] + (1 - SOLVABLE) * probability[:, BOTH:].sum(1)


if __name__ == "__main__":
    main()
