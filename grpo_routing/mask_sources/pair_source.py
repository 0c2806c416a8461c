"""What sources that read authored pairs share: which pairs, when they are read again, and the controls of the pairs.

    shuffled   the 2N completions dealt anew into N (first, second) pairs: same texts, labels that mean nothing
    nonhack    neutral minus clean answers: a real direction in the same coordinates that is not about hacking
    haar       a random direction of the same shape and norm in place of the fitted one

`held_out` of the pairs only measure how well the rest separates them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.controls import OF_LABELS
from grpo_routing.mask_sources.direction import check_overlap
from grpo_routing.mask_sources.pairs import Pair, PairFileError, load_pairs
from grpo_routing.mask_sources.source import ScoreSource
from grpo_routing.mask_sources.view import Memory, StepView, unknown
from grpo_routing.types import Labels

OF_PAIRS = ("shuffled", "nonhack", "haar")


@dataclass(frozen=True)
class PairSource(ScoreSource):
    pairs: str
    known: tuple[str, ...]
    held_out: int
    refresh_every: int  # read again before every n-th step; 0: once
    overlap_floor: float  # the least that a refit should share with the one before it: mean squared cosine
    when_stale: str  # what becomes of a run whose refit shares less: warn or stop
    controls = (*OF_LABELS, "random", *OF_PAIRS)

    def __post_init__(self) -> None:
        """Refuse unusable pairs when the config is read. Raises PairFileError or ValueError."""
        super().__post_init__()
        pairs = load_pairs(self.pairs, self.known)
        if not 0 <= self.held_out <= len(pairs) - 2:
            raise ValueError(f"mask_source.held_out={self.held_out} of {len(pairs)} pairs for {list(self.known)} leaves fewer "
                             f"than 2 to fit; lower it or write more pairs")
        if self.refresh_every < 0 or not 0 <= self.overlap_floor <= 1 or self.when_stale not in ("warn", "stop"):
            raise ValueError(f"a refit needs refresh_every >= 0 (0: never), overlap_floor in [0, 1] and when_stale warn or stop; got "
                             f"{self.refresh_every}, {self.overlap_floor} and {self.when_stale!r}")
        bare = [number for number, pair in enumerate(pairs, 1) if not pair.neutral]
        if self.control == "nonhack" and bare:
            raise PairFileError(f"mask_source.control=nonhack needs a `neutral` completion in every pair; {self.pairs} lacks it in "
                                f"pairs {bare}")

    def load(self) -> list[Pair]:
        return load_pairs(self.pairs, self.known)

    def refitted(self, shared: Tensor, step: int) -> Memory:
        """Remember how much a refit shares with the one before it. Raises StaleBasisError."""
        check_overlap(float(shared), self.overlap_floor, self.when_stale, step)
        return {"overlap": torch.as_tensor(shared)}

    def facts(self, memory: Memory) -> dict[str, float]:
        said = {"fit_overlap": "overlap", "separation_held_out": "separation"}
        return {name: float(memory[key]) for name, key in said.items() if key in memory}

    @property
    def first(self) -> str:
        """Which answer of a pair stands on the hack's side."""
        return "neutral" if self.control == "nonhack" else "hack"

    def due(self, step: int) -> bool:
        """Whether the pairs are read again before this step (the first time apart)."""
        return self.refresh_every > 0 and step > 0 and step % self.refresh_every == 0

    def reserved(self, count: int) -> list[int]:
        """The pairs that only measure."""
        return sorted(random.Random(f"pairs/{self.seed}").sample(range(count), count)[: self.held_out])

    def dealt(self, count: int) -> list[int]:
        """Order of the 2 * count completions (hack, clean, hack, ...) under `shuffled`: the first half become the hacks."""
        return random.Random(f"shuffled/{self.seed}").sample(range(2 * count), 2 * count)


@dataclass(frozen=True)
class DirectionSource(PairSource):
    """A pair source that can serve at two levels: `rollout` scores rollouts along its direction, `gradient` gives a basis for the summed
    gradient and marks no rollout."""

    level: str
    kinds = ("subspace", "rollout")

    def __post_init__(self) -> None:
        if self.level not in ("gradient", "rollout"):
            raise ValueError(f"mask_source.level must be gradient or rollout; got {self.level!r}")
        super().__post_init__()

    @property
    def kind(self) -> str:
        return "subspace" if self.level == "gradient" else "rollout"

    @property
    def pilot_batches(self) -> int:
        return self.calibration.pilot_batches if self.level == "rollout" else 0

    def label(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        return (unknown(view), memory) if self.level == "gradient" else super().label(view, memory)
