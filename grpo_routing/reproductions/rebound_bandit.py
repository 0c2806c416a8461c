"""The rebound on a bandit of four actions, with a cap on honest reward (arXiv:2604.01476, section 2.3; baselines.md B1, B2, B8).

    actions    failed hack (0: it breaks the code), silent hack (3.5 always), correct (3.5 where the problem is solvable, .3), fail (.5)
    phases     I failed hacks -> II honest solving -> III the silent hack takes over
    cap C      of a step's 256 rollouts at most C correct ones are kept, drawn at random; the surplus is masked after its group's
               statistics (the paper: "masks the surplus"), or leaves the group before them (Screening)
    phase II   from the first step with failed hacks at half their start to the first with silent hack > correct

The paper's claim: a smaller C shortens phase II, as honest reward is scarcer. Here too, under both masks, down to C = 10; C = 0 adds
nothing (masked) or lengthens it (dropped). Where failed and silent hacks share a logit, the retreat takes the silent hack along, and
within 800 steps the rebound comes under the tightest caps only.
Departures: the start and the rewards are ours (the paper shows a policy over weights of billions); phase I ends gradually.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from grpo_routing.advantages import Grpo, Screening

FAILED, SILENT, CORRECT, FAIL = range(4)
START = (0.1, 0.01, 0.12, 0.77)
PAYS = torch.tensor([0.0, 3.5, 3.5, 0.5], dtype=torch.float64)
GROUPS, SIZE, SOLVABLE, RATE = 16, 16, 0.3, 0.15
CAPS = (None, 50, 40, 30, 20, 10, 0)  # None: no cap
INTENT = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # the logit that both hacks share


@dataclass(frozen=True)
class Arm:
    cap: int | None = None
    surplus: str = "masked"  # or dropped: before the group's statistics
    shared: bool = False  # failed and silent hacks have a logit in common, beside their own

    def __post_init__(self) -> None:
        if self.surplus not in ("masked", "dropped"):
            raise ValueError(f"surplus must be masked or dropped; got {self.surplus!r}")


@dataclass(frozen=True)
class Phases:
    """Steps, [S] each; nan where it never comes."""

    retreat: Tensor  # failed hacks are at half their start
    rebound: Tensor  # the silent hack overtakes correct
    peak: Tensor  # highest chance of correct on the way

    @property
    def second(self) -> Tensor:
        return self.rebound - self.retreat


def main() -> None:
    print("steps, mean of 6 seeds [lowest, highest], of 800; never: in how many seeds the silent hack did not take over")
    print(f"{'hacks':10}{'surplus':10}{'cap':>5}{'end of phase I':>18}{'length of phase II':>22}{'never':>7}{'peak of correct':>18}")
    for shared in (False, True):
        for surplus in ("masked", "dropped"):
            for cap in CAPS:
                found = phases(play(Arm(cap, surplus, shared)))
                came = found.second[~found.second.isnan()]
                said = f"{came.mean():.0f} [{came.min():.0f}, {came.max():.0f}]" if len(came) else "-"
                print(f"{'shared' if shared else 'own':10}{surplus:10}{'-' if cap is None else cap:>5}{found.retreat.mean():18.0f}"
                      f"{said:>22}{found.second.isnan().sum():7d}{found.peak.mean():18.3f}", flush=True)


def play(arm: Arm, steps: int = 800, seeds: int = 6) -> Tensor:
    """Probabilities of the actions before every step, [steps, S, 4]; the seeds are rows of one batch."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.tensor(START, dtype=torch.float64).log().repeat(seeds, 1)
    path = []
    for _ in range(steps):
        probability = torch.softmax(theta, 1)
        path.append(probability)
        drawn = torch.multinomial(probability.repeat_interleave(GROUPS, 0), SIZE, replacement=True, generator=generator)  # [S * 16, 16]
        unsolvable = torch.rand(len(drawn), 1, generator=generator) >= SOLVABLE
        rewards = torch.where((drawn == CORRECT) & unsolvable, PAYS[FAIL], PAYS[drawn])
        correct = ((drawn == CORRECT) & ~unsolvable).view(seeds, -1)
        lots = torch.rand(correct.shape, generator=generator)  # drawn with and without a cap: the same luck
        over = surplus_of(correct, lots, arm.cap).view_as(drawn)
        if arm.surplus == "dropped":
            advantages = Screening("sample", 1e-6, "loose", "batch")(rewards, over.double(), None)
        else:
            advantages = Grpo(1e-6)(rewards, None, None) * ~over
        push = one_hot(drawn, 4).double() - probability.repeat_interleave(GROUPS, 0)[:, None]
        step = (advantages[..., None] * push).view(seeds, -1, 4).mean(1)
        if arm.shared:
            step = step + INTENT * (step @ INTENT)[:, None]
        theta = theta + RATE * step
    return torch.stack(path)


def surplus_of(correct: Tensor, lots: Tensor, cap: int | None) -> Tensor:
    """Which correct rollouts of a step are too many: all but the `cap` with the highest lots. [S, N] bool -> [S, N] bool."""
    if cap is None:
        return torch.zeros_like(correct)
    place = torch.where(correct, lots, -1.0).argsort(1, descending=True).argsort(1)
    return correct & (place >= cap)


def phases(path: Tensor) -> Phases:
    """When the phases of a path [steps, S, 4] end."""
    return Phases(first(path[..., FAILED] <= path[0, :, FAILED] / 2), first(path[..., SILENT] > path[..., CORRECT]),
                  path[..., CORRECT].amax(0))


def first(reached: Tensor) -> Tensor:
    """Index of the first True of every column of [steps, S]; nan where there is none."""
    return torch.where(reached.any(0), reached.int().argmax(0).double(), torch.nan)


if __name__ == "__main__":
    main()
