"""GRIFT: gradient fingerprints (arXiv:2604.16242; baselines.md C).

    g(x)      gradient of the completion's likelihood in the live adapter, on the `layers` blocks whose hidden states change most:
              lowest mean over tokens of cos(H_{l-1}, H_l)
    f(x)      g M / |g M|, M a fixed matrix of random signs, `sketch` wide: the same M for every sample (T-C1, T-C3)
    clusters  k-means, k = 2, on the fingerprints of the last `window` rollouts
    name      the suspicious cluster is the one towards which the hacking answers of the authored pairs lie further than the clean ones,
              along the line between the centres: examples of known loopholes are the only label. (By nearest centre authored
              answers mostly fall into one cluster together, which names nothing.)
    score     log odds of the suspicious cluster, S = softmax(-distance^2 / temperature); with `residualise`, minus what log length
              explains of it in the window

Differs from the paper: the live adapter stands in for a fresh one (whose A gets no gradient while B = 0, T-C5), and pairs for an expert
who labels samples. The released code fingerprints genuine and hacked sets with a projection and an adapter of their own each,
which alone separates sets without any difference; here everything goes through one. `p` is the share of random namings of
the pairs (hack and clean swapped at random within pairs) that tell the clusters apart as well as the real one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, generator_for
from grpo_routing.mask_sources.direction import completion_gradients
from grpo_routing.mask_sources.pair_source import PairSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.policy import Policy
from grpo_routing.types import TokenBatch

ROUNDS, STARTS, SHUFFLES = 30, 4, 200


@dataclass(frozen=True)
class Fingerprint(PairSource):
    layers: int  # blocks to read; 0: all
    sketch: int
    window: int
    temperature: float
    residualise: bool
    micro_batch: int
    reads = ("pairs", "gradients")
    controls = tuple(name for name in PairSource.controls if name != "haar")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 0 or self.sketch < 1 or self.window < 2 or self.temperature <= 0:
            raise ValueError(f"fingerprint needs layers >= 0, sketch >= 1, window >= 2 and temperature > 0; got {self.layers}, "
                             f"{self.sketch}, {self.window} and {self.temperature}")

        if self.held_out:
            raise ValueError(f"fingerprint names its clusters by all pairs; mask_source.held_out must be 0, got {self.held_out}")

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        if "examples" not in memory or self.due(view.step):
            fresh = self.examples(view.policy)
            if "examples" in memory:
                shared = (memory["examples"] * fresh["examples"]).sum(1).square().mean()
                memory = memory | self.refitted(shared, view.step)
            memory = memory | fresh
        chosen = memory["layers"].tolist()
        prints = fingerprints(view.grads.modules, chosen, self.sketch, self.seed, view.grads.everyones)
        lengths = view.tokens.completion_mask.sum(1).double().log()
        able = view.grads.norms() > 0
        if not bool(able.any()):
            return torch.full((len(prints),), torch.nan, dtype=torch.float64), memory
        kept, kept_lengths = prints[able].float(), lengths[able]
        if "prints" in memory:
            kept, kept_lengths = torch.cat([memory["prints"], kept]), torch.cat([memory["lengths"], kept_lengths])
        kept, kept_lengths = kept[-self.window :], kept_lengths[-self.window :]
        centres = clusters(kept.double(), self.seed)
        suspicious, p = named(memory["examples"].double(), centres, self.seed)
        everything = self._odds(torch.cat([kept.double(), prints.double()]), centres, suspicious)
        window, scores = everything[: len(kept)], everything[len(kept) :]
        if self.residualise:
            scores = scores - slope(window, kept_lengths) * (lengths - kept_lengths.mean())
        memory = memory | {"prints": kept, "lengths": kept_lengths, "p": torch.tensor(p)}
        return torch.where(able, scores, torch.nan), memory

    def _odds(self, prints: Tensor, centres: Tensor, suspicious: int) -> Tensor:
        distance = torch.cdist(prints, centres).square() / self.temperature
        return distance[:, 1 - suspicious] - distance[:, suspicious]

    def facts(self, memory: Memory) -> dict[str, float]:
        return super().facts(memory) | ({"fingerprint_p": float(memory["p"])} if "p" in memory else {})

    def examples(self, policy: Policy) -> Memory:
        """Fingerprints of the pairs' answers, hack and clean by turns [2N, d], and the layers that are read."""
        pairs = self.load()
        texts = [(pair.prompt, text) for pair in pairs for text in (getattr(pair, self.first), pair.clean)]
        with policy.adapter.only(DEPLOYED):
            grads = completion_gradients(policy, texts, self.micro_batch)
        chosen = changing_layers(policy, texts, self.layers)
        prints = fingerprints(grads, chosen, self.sketch, self.seed)
        if self.control == "shuffled":
            prints = prints[self.dealt(len(pairs))]
        return {"examples": prints.float(), "layers": torch.tensor(chosen)}


def fingerprints(grads: dict[str, Tensor], layers: list[int], width: int, seed: int,
                 everyones: Callable[[str, Tensor], Tensor] = lambda at, rows: rows) -> Tensor:
    """[B, D] per module -> [B, width] of unit length; a zero gradient stays zero. `everyones` as of RolloutGrads."""
    total = 0
    for name, rows in grads.items():
        if layer_of(name) in layers:
            total = total + rows @ signs(name, rows.shape[1], width, seed).to(rows)
    return torch.nn.functional.normalize(everyones("fingerprints", total), dim=1)


@lru_cache(maxsize=512)
def signs(name: str, size: int, width: int, seed: int) -> Tensor:
    """Random signs / sqrt(width) [size, width], the same for every sample, step and process."""
    draw = torch.randint(0, 2, (size, width), generator=generator_for("sketch", seed, name, width), dtype=torch.int8)
    return (draw.float() * 2 - 1) / width**0.5


def layer_of(name: str) -> int:
    """Number of the decoder layer that a module belongs to. Raises ValueError for one that belongs to none."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    if not found:
        raise ValueError(f"fingerprint reads modules of numbered layers; {name} has no number")
    return int(found[1])


def changing_layers(policy: Policy, texts: list[tuple[str, str]], count: int) -> list[int]:
    """The layers whose hidden states change most on these completions, under the frozen model; all of them for 0."""
    tokens = policy.batch(texts)
    with policy.adapter.only():
        change = similarity(policy.hidden_states(tokens), tokens)
    return sorted(change.argsort()[: count or len(change)].tolist())


def similarity(states: tuple[Tensor, ...], tokens: TokenBatch) -> Tensor:
    """Mean over samples of the mean over completion tokens of cos(H_{l-1}, H_l), [layers]."""
    share = tokens.completion_mask / tokens.completion_mask.sum(1, keepdim=True)
    cosines = [torch.nn.functional.cosine_similarity(low[:, 1:], high[:, 1:], dim=-1) for low, high in pairwise(states)]
    return torch.stack([(cosine * share).sum(1).mean() for cosine in cosines])


def clusters(prints: Tensor, seed: int) -> Tensor:
    """Two centres [2, d] by Lloyd's algorithm, the best of some starts (k-means++); the same for the same prints."""
    best, least = prints[:2], np.inf
    for start in range(STARTS):
        generator = generator_for("k-means", seed, start)
        first = prints[int(torch.randint(len(prints), (1,), generator=generator))]
        weights = (prints - first).square().sum(1) + 1e-12
        centres = torch.stack([first, prints[int(torch.multinomial(weights, 1, generator=generator))]])
        for _ in range(ROUNDS):
            own = torch.cdist(prints, centres).argmin(1)
            moved = torch.stack([prints[own == k].mean(0) if bool((own == k).any()) else centres[k] for k in (0, 1)])
            if torch.equal(moved, centres):
                break
            centres = moved
        spread = float(torch.cdist(prints, centres).min(1).values.square().sum())
        if spread < least:
            best, least = centres, spread
    return best


def named(examples: Tensor, centres: Tensor, seed: int) -> tuple[int, float]:
    """Which cluster is suspicious, and the permutation p of how well the pairs [hack, clean, hack, ...] fall apart."""
    gap = (examples[0::2] - examples[1::2]) @ (centres[1] - centres[0])  # positive: the hack lies further towards cluster 1
    flips = torch.randint(0, 2, (SHUFFLES, len(gap)), generator=generator_for("permutation", seed)).double() * 2 - 1
    by_chance = (flips @ gap).abs()
    return int(gap.sum() > 0), float(((by_chance >= gap.sum().abs()).sum() + 1) / (SHUFFLES + 1))


def slope(values: Tensor, against: Tensor) -> Tensor:
    """Least-squares slope of values on `against`; 0 where that does not vary."""
    centred = against - against.mean()
    return (values * centred).sum() / centred.square().sum() if float(centred.square().sum()) > 0 else values.new_zeros(())
