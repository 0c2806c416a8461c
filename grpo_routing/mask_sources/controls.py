"""Controls of `persona_gradient`: the same modules and number of axes, but not the hack's direction.

    random     each module's axes replaced by a random orthonormal frame of the same shape
    shuffled   the 2N completions dealt anew into N (first, second) pairs: same texts, labels that mean nothing
    nonhack    neutral minus clean answers: a real direction in the same coordinates that is not about hacking

A mask source means nothing beside a vanilla run alone; in earlier work a random direction often did as well.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.mask_sources.direction import DirectionSource, completion_gradients, pair_differences
from grpo_routing.mask_sources.pairs import Pair, PairFileError, load_pairs
from grpo_routing.policy import Policy
from grpo_routing.types import Basis


@dataclass(frozen=True)
class RandomBasis(DirectionSource):
    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        return pair_differences(policy, pairs, "hack", "clean", self.micro_batch)

    def finish(self, basis: Basis) -> Basis:
        return Basis({name: self._frame(name, rows) for name, rows in basis.modules.items()})

    def _frame(self, name: str, rows: Tensor) -> Tensor:
        digest = hashlib.sha256(f"random/{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        frame, _ = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[0], generator=generator, dtype=torch.float64))
        return frame.T.to(rows)


@dataclass(frozen=True)
class Shuffled(DirectionSource):
    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        texts = [(pair.prompt, text) for pair in pairs for text in (pair.hack, pair.clean)]
        order = random.Random(f"shuffled/{self.seed}").sample(range(len(texts)), len(texts))
        grads = completion_gradients(policy, texts, self.micro_batch)
        return {name: g[order[: len(pairs)]] - g[order[len(pairs) :]] for name, g in grads.items()}


@dataclass(frozen=True)
class NonHack(DirectionSource):
    def __post_init__(self) -> None:
        super().__post_init__()
        bare = [number for number, pair in enumerate(load_pairs(self.pairs, self.known), 1) if not pair.neutral]
        if bare:
            raise PairFileError(f"mask_source=nonhack needs a `neutral` completion in every pair; {self.pairs} lacks it in pairs {bare}")

    def differences(self, policy: Policy, pairs: list[Pair]) -> dict[str, Tensor]:
        return pair_differences(policy, pairs, "neutral", "clean", self.micro_batch)
