"""The hack-ward direction in activations: mean difference between the hacking and the clean answers of the pairs.

    h(x)       activation of a completion at `place`, pooled over it: its mean, or its last token
    v          their direction place by place (activation_direction.py), fitted to all but `held_out` pairs
    score(x)   mean over places of (h(x) . v - centre) / scale; centre is the midpoint of the pairs' two means on v, scale half
               their distance: -1 is where clean pairs lie, +1 where hacks lie, 0 between them

place: residual       hidden states at `layers`, 0 the embedding
place: coordinates    what each adapted module reads, in the deployed block's own coordinates (A x of lora, V^T x of svd)
model: base           the frozen model, all blocks off: fitted once, cannot drift with the policy (lora's coordinates turn with A)
model: deployed       as the deployed policy is now; refitted every `refresh_every` steps, quarantine ablated

level: rollout        scores rollouts
level: gradient       a basis for the summed gradient, place=coordinates only: the gradient of lora's B is a sum of (slope of the
                      output) x (A x), so its part along v is the span of all e_o x v; the gradient of a svd knob is a product
                      with V^T x, so v itself is the axis. The first has no sign: use projection.gate=no_gate

Reads authored pairs of known loopholes and activations; no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED
from grpo_routing.mask_sources.activation_direction import answers, check_apart, direction, sides
from grpo_routing.mask_sources.direction import Fit
from grpo_routing.mask_sources.pair_source import DirectionSource
from grpo_routing.mask_sources.pairs import Pair
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.policy import Policy
from grpo_routing.projections.subspace import chance_share
from grpo_routing.types import Basis, TokenBatch

CHOICES = {"place": ("residual", "coordinates"), "position": ("mean", "last", "prompt_last"),
           "model": ("base", "deployed"), "statistic": ("mean", "t")}


@dataclass(frozen=True)
class PersonaActivation(DirectionSource):
    place: str
    layers: tuple[int, ...]
    position: str
    model: str
    statistic: str

    def __post_init__(self) -> None:
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"mask_source.{name} must be {' or '.join(legal)}; got {getattr(self, name)!r}")
        if self.place == "residual" and not self.layers:
            raise ValueError("mask_source.place=residual needs some mask_source.layers; 0 is the embedding")
        if self.level == "gradient" and self.place != "coordinates":
            raise ValueError("mask_source.level=gradient needs mask_source.place=coordinates: only there has an activation an axis in the "
                             "gradient")
        super().__post_init__()

    @property
    def reads(self) -> tuple[str, ...]:
        return ("pairs", "activations")

    @property
    def needs_coordinates(self) -> bool:
        return self.place == "coordinates"

    @property
    def controls(self) -> tuple[str, ...]:
        return ("none", "shuffled", "nonhack", "haar") if self.level == "gradient" else DirectionSource.controls

    @property
    def default_control(self) -> str:
        return "haar" if self.level == "gradient" else "rate_matched"

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        if "centre" not in memory or (self.model == "deployed" and self.due(view.step)):
            fresh = self.probe(view.policy)
            if "centre" in memory:
                shared = torch.stack([(memory[key] @ v).square() for key, v in fresh.items() if key.startswith("v/")]).mean()
                memory = memory | self.refitted(shared, view.step)
            memory = memory | fresh
        return along(self.activations(view.policy, view.tokens), memory), memory

    def fit(self, policy: Policy) -> Fit:
        """level: gradient. The basis, from the deployed policy as it stands."""
        memory, modules = self.probe(policy), {}
        for name, flat in policy.adapter.flatten(DEPLOYED).items():
            v = memory[f"v/{name}"].to(flat)
            spread = policy.adapter.modules[name].outputs_along(v)
            modules[name] = spread if spread.ndim == 2 else spread[None]
        basis = Basis(modules)
        facts = {"pairs": float(len(self.load()) - self.held_out), "modules": float(len(modules)), "chance": chance_share(basis)}
        return Fit(basis, facts | self.facts(memory))

    def probe(self, policy: Policy) -> Memory:
        """Directions, centres and scales from the pairs."""
        pairs = self.load()
        hacks, clean = self._sides(policy, pairs)
        reserved = self.reserved(len(pairs))
        rows = [row for row in range(len(pairs)) if row not in reserved]
        memory, centres, scales, ahead = {}, [], [], []
        check_apart({f"place {name}": (hacks[name] - clean[name])[rows] for name in hacks}, "mask_source.layers or mask_source.position")
        for name in hacks:
            v = direction(hacks[name][rows] - clean[name][rows], self.statistic, self.control, self.seed, name)
            along, other = hacks[name] @ v, clean[name] @ v
            memory[f"v/{name}"] = v
            centres.append((along[rows].mean() + other[rows].mean()) / 2)
            scales.append(((along[rows].mean() - other[rows].mean()).abs() / 2).clamp_min(1e-9))
            ahead.append((along - other)[reserved])
        memory |= {"centre": torch.stack(centres), "scale": torch.stack(scales)}
        if reserved:
            margin = (torch.stack(ahead) / memory["scale"][:, None]).mean(0)
            memory["separation"] = (margin > 0).double().mean()
        return memory

    def _sides(self, policy: Policy, pairs: list[Pair]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations of the first and of the second answers, name -> [N, d] each."""
        position = "last" if self.position == "prompt_last" else self.position  # both answers of a pair have one prompt
        every = self.activations(policy, policy.batch(answers(pairs, self.first)), position)
        return sides(every, self.dealt(len(pairs)) if self.control == "shuffled" else None)

    def activations(self, policy: Policy, tokens: TokenBatch, position: str | None = None) -> dict[str, Tensor]:
        """place -> [B, d], at `self.position` unless told."""
        position = position or self.position
        with policy.adapter.only(*(() if self.model == "base" else (DEPLOYED,))):
            if self.place == "residual":
                return dict(zip(map(str, self.layers), policy.hidden_at(tokens, self.layers, position)))
            return policy.pooled_coordinates(tokens, position)


def along(activations: dict[str, Tensor], memory: Memory) -> Tensor:
    """Scores [B] of activations place -> [B, d] under a fitted probe, whatever model they were read from."""
    parts = [(h.double() @ memory[f"v/{name}"] - memory["centre"][place]) / memory["scale"][place]
             for place, (name, h) in enumerate(activations.items())]
    return torch.stack(parts).mean(0)
