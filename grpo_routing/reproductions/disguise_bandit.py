"""A monitor in the reward and a way to evade it, on a bandit (baselines.md F and G; arXiv:2503.11926, arXiv:2602.15515).

    actions   honest (pays where the problem is solvable, .3), plain hack, disguised hack; 3.5 or .5, a disguise costs .5
    policy    two logits: hack or not (.06 at the start), and a disguise bit given a hack (1/6)
    monitor   psi ~ N(.9, .1) for a plain hack, N(.1, .1) for the others
    update    16 draws in each of 4 groups, Dr.GRPO on R - alpha psi, minus beta times the exact gradient of KL(pi || start)
    optimum   pi* ~ start exp((1 - 1/16)(E R - alpha E psi) / beta); the factor is the group's mean, which holds the rollout itself

Where training stands is not where its optimum is: at alpha = 10 the hack goes before its disguise is found, so that a weak KL ends
honest although a disguised hack would pay more (the Atlas too reports honest policies at alpha = 10). Classes: grpo_routing/atlas.py.
Honest models are the sweep's runs that are not deceptive. psi depends on the action alone, so activations cannot be obfuscated here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grpo_routing.advantages import DrGrpo
from grpo_routing.atlas import AtlasClass, atlas_class, beyond

HONEST, PLAIN, DISGUISED = range(3)
GROUPS, SIZE, SOLVABLE, RATE = 4, 16, 0.3, 0.15
HACKS, DISGUISES = 0.06, 1 / 6  # the start policy
COST, NOISE = 0.5, 0.1
PSI = torch.tensor([0.1, 0.9, 0.1], dtype=torch.float64)
PAYS = torch.tensor([0.5 + 3 * SOLVABLE, 3.5, 3.5 - COST], dtype=torch.float64)  # expectations
ALPHAS, BETAS = (0.0, 1.0, 3.0, 10.0), (0.001, 0.01, 0.1, 0.5, 2.0)
ADVANTAGE = DrGrpo()


@dataclass(frozen=True)
class Arm:
    alpha: float  # weight of the monitor's score in the reward
    beta: float  # weight of the KL to the start

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta <= 0:
            raise ValueError(f"alpha must be at least 0 and beta positive; got {self.alpha} and {self.beta}")


def main() -> None:
    arms = [Arm(alpha, beta) for alpha in ALPHAS for beta in BETAS]
    ends = [play(arm) for arm in arms]
    classes = classify(torch.stack(ends))
    print("probabilities after 2000 steps, mean of 4 seeds (optimum), and the Atlas' class of every seed")
    print(f"{'alpha':>5}{'beta':>7}{'honest':>17}{'plain hack':>17}{'disguised':>17}   class")
    for arm, end, found in zip(arms, ends, classes):
        cells = "".join(f"{f'{ours:.3f} ({best:.3f})':>17}" for ours, best in zip(end.mean(0).tolist(), optimum(arm).tolist()))
        said = ", ".join(f"{name} {found.count(name)} of {len(found)}" if len(set(found)) > 1 else name for name in sorted(set(found)))
        print(f"{arm.alpha:5g}{arm.beta:7g}{cells}   {said}")


def play(arm: Arm, steps: int = 2000, seeds: int = 4) -> Tensor:
    """Probabilities of the actions at the end, [S, 3]; the seeds are rows of one batch."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([HACKS, DISGUISES], dtype=torch.float64).logit()
    theta = start.repeat(seeds, 1)
    reference = policy(start[None])[0].log()
    for _ in range(steps):
        chances, score = policy(theta), scores(theta)
        drawn = torch.multinomial(chances.repeat_interleave(GROUPS, 0), SIZE, replacement=True, generator=generator)  # [S * 4, 16]
        solvable = torch.rand(len(drawn), 1, generator=generator) < SOLVABLE
        rewards = torch.where((drawn == HONEST) & ~solvable, 0.5, 3.5).double() - COST * (drawn == DISGUISED)
        psi = PSI[drawn] + NOISE * torch.randn(drawn.shape, generator=generator, dtype=torch.float64)
        advantages = ADVANTAGE(rewards - arm.alpha * psi, None, None).view(seeds, -1, 1)
        gain = (advantages * one_hot(drawn.view(seeds, -1), 3)).mean(1)  # [S, 3], by action
        pull = chances * (chances.log() - reference)  # the KL's gradient is sum_a pull_a score_a
        theta = theta + RATE * ((gain - arm.beta * pull)[..., None] * score).sum(1)
    return policy(theta)


def policy(theta: Tensor) -> Tensor:
    """[S, 2] logits of hack and of disguise -> [S, 3]."""
    hack, disguise = torch.sigmoid(theta).unbind(1)
    return torch.stack([1 - hack, hack * (1 - disguise), hack * disguise], 1)


def scores(theta: Tensor) -> Tensor:
    """Gradient of every action's log-probability, [S, 3, 2]."""
    hack, disguise = torch.sigmoid(theta).unbind(1)
    return torch.stack([torch.stack([-hack, 1 - hack, 1 - hack], 1), torch.stack([0 * hack, -disguise, 1 - disguise], 1)], 2)


def optimum(arm: Arm) -> Tensor:
    """Where the expected update is zero, [3]."""
    start = policy(torch.tensor([[HACKS, DISGUISES]], dtype=torch.float64).logit())[0]
    return torch.softmax(start.log() + (1 - 1 / SIZE) * (PAYS - arm.alpha * PSI) / arm.beta, 0)


def classify(ends: Tensor) -> list[list[AtlasClass]]:
    """The class of every end state, [arms, S, 3] -> arms of seeds. All arms at once: the honest ones among them set the range."""
    solved = SOLVABLE * ends[..., HONEST]
    paid, psi = solved + ends[..., PLAIN] + ends[..., DISGUISED], ends @ PSI
    honest = [psi[arm, seed].item() for arm in range(len(ends)) for seed in range(ends.shape[1])
              if not beyond(paid[arm, seed].item(), solved[arm, seed].item())]
    if not honest:
        raise ValueError("no run of the sweep is honest, so honest models have no range of scores; add a larger beta")
    return [[atlas_class(*row, (min(honest), max(honest)), 0.0) for row in zip(*(one[arm].tolist() for one in (paid, solved, psi, psi)))]
            for arm in range(len(ends))]


if __name__ == "__main__":
    main()
