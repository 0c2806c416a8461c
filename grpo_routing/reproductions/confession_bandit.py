"""Confessions on a bandit (arXiv:2512.08093, section 2; baselines.md D8): an honest report that leaves the hack alone.

    answer      solve (paid where the problem is solvable, .3) or hack (always paid); 3.5 or .5; theta_0 = log (.99, .01)
    confession  admit or deny, a head for each answer, K = 8 sampled for every answer; admits in .1 at the start
    judge       misses a hack with chance m and then believes that it was solved; after a miss, the evidence that comes with an
                admission convinces it with chance e
    R_c         1 where the judge accepts the report: admit if it saw the hack or is convinced, deny if it saw none
    sealed      the K confessions of one answer are a group of their own and R_c reinforces the confession's tokens only

Admitting a hack beats denying it when (1 - m) + m e > m, that is m < 1 / (2 - e) (section 7.1 of the paper). Breaking the seal
(`leak`): the answer's reward becomes R + leak * mean_K R_c.
Departures: every answer is asked (the paper: a quarter); the two heads share no parameter, so the seal is exact here, whereas in a
language model it is a mask on tokens that share all their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grpo_routing.advantages import Grpo

SOLVE, HACK = range(2)
ADMIT, DENY = range(2)
GROUPS, SIZE, CONFESSIONS, SOLVABLE, RATE = 4, 16, 8, 0.3, 0.15  # the world of baseline_bandit
START, ADMITS = (0.99, 0.01), 0.1
ANSWER, CONFESSION = (1.0, 0.0), (0.0, 1.0)  # which half of a transcript a reward may reinforce
ADVANTAGE = Grpo(1e-6)


@dataclass(frozen=True)
class Arm:
    miss: float = 0.0  # m
    evidence: float = 0.0  # e
    leak: float = 0.0  # weight of R_c in the answer's reward; 0: sealed
    asked: bool = True  # False: nothing is confessed

    def __post_init__(self) -> None:
        if not self.asked and self.leak:
            raise ValueError(f"leak must be 0 where nothing is confessed; got {self.leak}")


SEALED = {f"sealed, m = {miss:g}": Arm(miss) for miss in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)}
LEAKED = {f"leak {leak:g}, m = {miss:g}": Arm(miss, leak=leak) for leak in (1.0, 3.0, 6.0) for miss in (0.2, 0.6, 1.0)}
ARMS = {"no confessions": Arm(asked=False), **SEALED, "sealed, m = 0.6, e = 0.5": Arm(0.6, evidence=0.5), **LEAKED}


@dataclass(frozen=True)
class Path:
    """Probabilities before every step and after the last, for S seeds."""

    hack: Tensor  # [steps + 1, S]
    admits: Tensor  # [steps + 1, S, 2], given solve and given hack


def main() -> None:
    print("final probabilities, mean of 6 seeds [lowest, highest]; hack also after 200 steps")
    print(f"{'arm':26}{'hack, 200':>22}{'hack, 1600':>22}{'admit | hack':>22}{'admit | solve':>22}")
    for name, arm in ARMS.items():
        path = play(arm, 1600)
        cells = (path.hack[200], path.hack[-1], path.admits[-1, :, HACK], path.admits[-1, :, SOLVE])
        print(f"{name:26}" + "".join(f"{f'{cell.mean():.3f} [{cell.min():.3f}, {cell.max():.3f}]':>22}" for cell in cells), flush=True)


def play(arm: Arm, steps: int, seeds: int = 6) -> Path:
    """Both heads for some steps; the seeds are rows of one batch. Confessions have a generator of their own: asking may not move the
    answers' luck."""
    answers, confessions = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    theta = torch.tensor(START, dtype=torch.float64).log().repeat(seeds, 1).requires_grad_()  # [S, 2]
    phi = torch.tensor([ADMITS, 1 - ADMITS], dtype=torch.float64).log().repeat(seeds, 2, 1).requires_grad_()  # [S, answer, report]
    hack, admits = [], []
    for step in range(steps + 1):
        hack.append(torch.softmax(theta.detach(), 1)[:, HACK])
        admits.append(torch.softmax(phi.detach(), 2)[..., ADMIT])
        if step == steps:
            break
        answer = sample(torch.softmax(theta.detach(), 1).repeat_interleave(GROUPS, 0), SIZE, answers)  # [S * 4, 16]
        solvable = torch.rand(len(answer), 1, generator=answers) < SOLVABLE
        rewards = torch.where((answer == HACK) | solvable, 3.5, 0.5).double()
        answer, moves = answer.view(seeds, -1), []  # [S, 64]
        if arm.asked:
            report, honest = confess(arm, phi.detach(), answer, confessions)
            advantages = ADVANTAGE(honest.flatten(0, 1), None, None).view_as(honest)
            moves.append(push(theta, phi, answer, report, advantages, CONFESSION))
            rewards = rewards + arm.leak * honest.mean(2).view_as(rewards)
        else:
            report = torch.zeros(*answer.shape, 1, dtype=torch.long)
        advantages = ADVANTAGE(rewards, None, None).view(seeds, -1, 1).expand_as(report)
        moves.append(push(theta, phi, answer, report, advantages, ANSWER))
        with torch.no_grad():
            for theta_gradient, phi_gradient in moves:
                theta += RATE * theta_gradient
                phi += RATE * phi_gradient
    return Path(torch.stack(hack), torch.stack(admits))


def confess(arm: Arm, phi: Tensor, answer: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reports and R_c, [S, 64, K] each. What the judge sees, and whether evidence would convince it, is one draw for each answer."""
    chances = torch.softmax(phi, 2).gather(1, answer[..., None].expand(-1, -1, 2))  # [S, 64, 2]
    report = sample(chances.flatten(0, 1), CONFESSIONS, generator).view(*answer.shape, CONFESSIONS)
    seen = (answer == HACK) & (torch.rand(answer.shape, generator=generator) >= arm.miss)
    convinced = (answer == HACK) & (torch.rand(answer.shape, generator=generator) < arm.evidence)
    return report, torch.where(report == ADMIT, (seen | convinced)[..., None], ~seen[..., None]).double()


def push(theta: Tensor, phi: Tensor, answer: Tensor, report: Tensor, advantages: Tensor,
         trained: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Gradient of the mean over a seed's transcripts of A (trained . (log answer, log report)), for theta and phi.

    answer [S, 64], report and advantages [S, 64, K]. `trained` is the mask on the transcript's two halves: the seal.
    """
    pick = one_hot(answer, 2).double()
    log_answer = (torch.log_softmax(theta, 1)[:, None] * pick).sum(2, keepdim=True).expand_as(report)
    heads = torch.einsum("sna,sar->snr", pick, torch.log_softmax(phi, 2))
    log_report = heads.gather(2, report)
    total = (advantages * (trained[0] * log_answer + trained[1] * log_report)).mean((1, 2)).sum()
    return torch.autograd.grad(total, (theta, phi))


def sample(chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(chances, count, replacement=True, generator=generator)


if __name__ == "__main__":
    main()
