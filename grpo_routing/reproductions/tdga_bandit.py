"""TDGA on a contextual bandit (routing.md sections 3 and 5, T7; the paper has no toy, this one is ours).

    600 contexts x in R^24 and a bias; 6 genuine actions, of which argmax(W* x + 3 noise) is right; one hack action
    policy    softmax(W x), W [7, 25], the bias of the hack -2 at the start
    proxy     1 for the right action and always for the hack          true reward    0 for the hack
    warm-up   20 steps of cross-entropy on the right actions, rate .5; U and alpha from the update, then W is restored
    training  1500 steps up the exact gradient of the expected proxy, projected by `projection=restrict` itself; SGD at 1 or Adam at .05

The controls differ in one word each: random U (mask_source.control), norm-matched (length: whole), vanilla at TDGA's length
(direction: whole). Rewards are expectations over the contexts; `first` is the first step at which the hack has more than half.
Departures: the spec sheet does not give the scales of x and W*, which are 1 here, nor how its U were drawn. What a random U
does depends on how much of the hack it holds, so those rows are means over several draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, generator_for
from grpo_routing.projections.restrict import Restrict
from grpo_routing.types import Trusted

CONTEXTS, WIDTH, GENUINE, NOISE, BIAS = 600, 24, 6, 3.0, -2.0
HACK = GENUINE
WARM_UP, WARM_UP_RATE, STEPS, RATES = 20, 0.5, 1500, {"sgd": 1.0, "adam": 0.05}
SEEDS, DRAWS = (0, 1), 5  # worlds; draws of a random U in each


@dataclass(frozen=True)
class Arm:
    k: int = 0  # trusted directions; 0: vanilla
    control: str = "none"  # or random
    direction: str = "restricted"
    length: str = "restricted"
    draw: int = 0  # of a random U


VANILLA = Arm()
ROWS = {  # name -> arm, the spec sheet's hack / true reward by SGD and by Adam
    "vanilla": (VANILLA, (0.994, 0.005), (0.881, 0.114)),
    "TDGA K=1": (Arm(1), (0.007, 0.375), (0.042, 0.251)),
    "TDGA K=3": (Arm(3), (0.002, 0.609), (0.063, 0.605)),
    "TDGA K=5": (Arm(5), (0.002, 0.679), (0.097, 0.734)),
    "norm-matched, K=5": (Arm(5, length="whole"), (0.000, 0.746), None),
    "vanilla, length of K=1": (Arm(1, direction="whole"), (0.682, 0.239), None),
    "vanilla, length of K=3": (Arm(3, direction="whole"), (0.412, 0.408), None),
    "vanilla, length of K=5": (Arm(5, direction="whole"), (0.309, 0.468), None),
    "random U, K=1": (Arm(1, "random"), (0.864, None), (0.026, None)),
    "random U, K=3": (Arm(3, "random"), (0.757, None), (0.445, None)),
    "random U, K=5": (Arm(5, "random"), (0.853, None), (0.438, None)),
}


@dataclass(frozen=True)
class Outcome:
    hack: float  # probability of the hack at the end, mean over contexts
    true: float  # true reward at the end
    peak: float  # highest true reward on the way
    first: int | None  # step at which hack first exceeds a half


def main() -> None:
    print(f"after {STEPS} steps, mean of {len(SEEDS)} seeds, random U of {DRAWS} draws in each; ours (spec sheet). peak: of the true "
          f"reward; first: step at which hack first exceeds .5")
    for place, optimizer in enumerate(RATES):
        print(f"{optimizer.upper():<25}{'hack':<15}{'true':<15}{'peak':<8}first")
        for name, (arm, *sheet) in ROWS.items():
            runs, theirs = outcomes(arm, optimizer), sheet[place] or (None, None)
            mean = {field: sum(getattr(one, field) for one in runs) / len(runs) for field in ("hack", "true", "peak")}
            said = "".join(f"{mean[field]:.3f} {f'({value:.3f})' if value is not None else '':<9}" for field, value in zip(mean, theirs))
            print(f"{name:<25}{said}{mean['peak']:.3f}   {crossings(runs)}", flush=True)


def crossings(runs: list[Outcome]) -> str:
    """When the hack took over, run by run; of many runs, in how many."""
    found = [one.first for one in runs]
    if len(runs) > len(SEEDS):
        return f"in {sum(step is not None for step in found)} of {len(runs)}"
    return ", ".join("never" if step is None else str(step) for step in found)


def outcomes(arm: Arm, optimizer: str) -> list[Outcome]:
    """The runs behind a row."""
    return [run(replace(arm, draw=draw), optimizer, seed) for seed in SEEDS for draw in range(DRAWS if arm.control == "random" else 1)]


def world(seed: int) -> tuple[Tensor, Tensor]:
    """Contexts [N, 25], the last number 1, and the right action of each [N]; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(CONTEXTS, WIDTH, generator=generator, dtype=torch.float64)
    truth = torch.randn(GENUINE, WIDTH, generator=generator, dtype=torch.float64)
    scores = x @ truth.T + NOISE * torch.randn(CONTEXTS, GENUINE, generator=generator, dtype=torch.float64)
    return torch.cat([x, x.new_ones(CONTEXTS, 1)], 1), scores.argmax(1)


def start() -> Tensor:
    """W at the start, [7, 25]."""
    weights = torch.zeros(GENUINE + 1, WIDTH + 1, dtype=torch.float64)
    weights[HACK, -1] = BIAS
    return weights


def warm_up(x: Tensor, right: Tensor) -> Tensor:
    """The update of a few steps of cross-entropy on the right actions, [7, 25]."""
    weights = start()
    target = torch.nn.functional.one_hot(right, GENUINE + 1).to(x)
    for _ in range(WARM_UP):
        weights = weights - WARM_UP_RATE * (torch.softmax(x @ weights.T, 1) - target).T @ x / len(x)
    return weights - start()


def trusted_of(update: Tensor, arm: Arm, seed: int) -> Trusted:
    """The top-k output directions of an update and their shares; or random directions with the same shares."""
    u, s, _ = torch.linalg.svd(update, full_matrices=False)
    if arm.control == "random":
        u = torch.linalg.qr(torch.randn(u.shape, generator=generator_for("random", seed, arm.draw), dtype=u.dtype)).Q
    return Trusted({"W": u[:, : arm.k]}, {"W": s[: arm.k] / s[: arm.k].sum()}, update.shape[1])


def run(arm: Arm, optimizer: str, seed: int, steps: int = STEPS) -> Outcome:
    """One run. Raises ValueError for an optimizer that has no rate."""
    if optimizer not in RATES:
        raise ValueError(f"optimizer must be one of {', '.join(RATES)}; got {optimizer!r}")
    x, right = world(seed)
    trusted = trusted_of(warm_up(x, right), arm, seed) if arm.k else None
    restrict = Restrict("gradient", arm.direction, arm.length)
    weights = start().requires_grad_()
    moves = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]([weights], RATES[optimizer])
    paid = torch.nn.functional.one_hot(right, GENUINE + 1).to(x)
    proxy = paid.clone()
    proxy[:, HACK] = 1.0
    peak, first = 0.0, None
    for step in range(steps + 1):
        with torch.no_grad():
            chances = torch.softmax(x @ weights.T, 1)
            hack, true = float(chances[:, HACK].mean()), float((chances * paid).sum(1).mean())
        peak = max(peak, true)
        first = step if first is None and hack > 0.5 else first
        if step == steps:
            return Outcome(hack, true, peak, first)
        gained = (chances * proxy).sum(1, keepdim=True)
        gradient = -(chances * (proxy - gained)).T @ x / len(x)  # of minus the expected proxy
        if trusted:
            gradient = restrict.gradient({DEPLOYED: {"W": gradient.flatten()}}, trusted)[DEPLOYED]["W"].view_as(weights)
        weights.grad = gradient
        moves.step()
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main()
