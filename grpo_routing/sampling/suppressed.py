"""Generation-time suppression: the baseline beside advantage modification (Wu & Tang, arXiv:2604.01476; baselines.md B2).

    h <- h - strength max(<h, d>, 0) d        output of the decoder layers `layers`, at every token, while rollouts are sampled

d is the unit direction of the pairs in that layer's output (the one of `mask_source=persona_activation`, fitted to all pairs on
the frozen model when the run is built). A component that points away from the hack is left alone.

The gradient forward, evaluation, audit and deployment know nothing of it: the unedited policy is trained, at ratio 1, on what the
edited one wrote. That is off-policy without importance weights, as in the paper; `rollout/sampler_gap` says how far. Anchor
groups train, so they are sampled like the others; a pilot does not, and shows the untrained policy as it is.

Differs from the paper: each pair's difference counts with unit length, and the band is that of a small model (60-75 % of depth there).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo_routing.mask_sources.activation_direction import answers, check_apart, direction, sides
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.policy import Policy

CHOICES = {"position": ("mean", "last"), "control": ("none", "haar")}


@dataclass(frozen=True)
class Suppressed:
    pairs: str
    known: tuple[str, ...]
    layers: tuple[int, ...]  # hidden states: 1 is the output of the first decoder layer
    position: str  # of the pairs' answers, where d is read
    strength: float  # 1 removes the component
    control: str  # haar: a random direction of the same shape in place of d
    seed: int
    default_control = "haar"
    reads = ("pairs", "activations")
    at_deployment = ("hooks of sampling gone",)

    def __post_init__(self) -> None:
        """Refuse unusable settings when the config is read. Raises PairFileError or ValueError."""
        load_pairs(self.pairs, self.known)
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"sampling.{name} must be {' or '.join(legal)}; got {getattr(self, name)!r}")
        if self.strength <= 0:
            raise ValueError(f"sampling.strength must be positive; got {self.strength}. Use sampling=plain for 0")
        if not self.layers or min(self.layers) < 1 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"sampling.layers must name some decoder layers, counted from 1, once each; got {list(self.layers)}")

    def fit(self, policy: Policy) -> Suppression:
        """The directions of the frozen model. Raises ValueError for a layer that cannot be edited where the direction is read."""
        if max(self.layers) >= policy.depth:  # the last hidden state is read behind the final norm, and a layer is edited before it
            raise ValueError(f"sampling.layers must lie in 1 to {policy.depth - 1} for this model of {policy.depth} layers; got "
                             f"{list(self.layers)}")
        with policy.adapter.only():
            read = policy.hidden_at(policy.batch(answers(load_pairs(self.pairs, self.known), "hack")), self.layers, self.position)
        hacks, clean = sides({str(layer): h for layer, h in zip(self.layers, read)})
        for name in hacks:
            check_apart({f"layer {name}": hacks[name] - clean[name]}, "sampling.layers or sampling.position")
        return Suppression({layer: direction(hacks[name] - clean[name], "mean", self.control, self.seed, name)
                            for layer, name in zip(self.layers, hacks)}, self.strength)


@dataclass(frozen=True)
class Suppression:
    directions: dict[int, Tensor]  # layer -> [d], unit length
    strength: float

    def during(self, policy: Policy) -> AbstractContextManager[None]:
        return policy.edited({layer: partial(without, d=d, strength=self.strength) for layer, d in self.directions.items()})


def without(h: Tensor, d: Tensor, strength: float) -> Tensor:
    """h minus `strength` times its positive component along d: [..., d], [d] -> [..., d]. Computed in float32 at least."""
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    unit = d.to(wide)
    return (wide - strength * (wide @ unit).clamp_min(0)[..., None] * unit).to(h)
