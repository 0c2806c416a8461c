"""TDGA: trusted-direction gradient alignment (routing.md §3). What a short clean warm-up moved is trusted, the rest is not.

    warm-up   `steps` of supervised fine-tuning on the clean answers of the pairs, from the policy at step 0; then W0 is restored
    per module   dW = U S V^T of the warm-up's update, U^(K) the top-K left singular vectors, alpha_i = S_i / sum S
    handed on    U and alpha: projection=restrict keeps U diag(alpha) U^T of the output side of the gradient, for the whole run

Reads clean demonstrations only: no hack, no label, no reward. weights=uniform drops alpha (a true projector; with alpha the projector
shrinks every step, ||P|| = alpha_1 <= 1, which under SGD is a smaller rate). Not given in the paper and chosen here: the restored
start, the warm-up's data, length and rate, and that only the adapter's B is projected (A keeps its gradient, routing.md §4.3).
Control `random`: random output directions, the same K and alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, generator_for
from grpo_routing.mask_sources.direction import Fit, completion_gradients
from grpo_routing.mask_sources.pairs import load_pairs
from grpo_routing.mask_sources.source import MaskSource
from grpo_routing.mask_sources.view import Memory, StepView, unknown
from grpo_routing.policy import Policy
from grpo_routing.types import Labels, Trusted


@dataclass(frozen=True)
class TrustedSubspace(MaskSource):
    pairs: str
    known: tuple[str, ...]
    k: int
    weights: str
    steps: int
    lr: float
    micro_batch: int
    kind = "trusted"
    kinds = ("trusted",)
    reads = ("clean answers of the pairs",)
    controls = ("none", "random")
    default_control = "random"
    refresh_every = 0
    needs_lora = True

    def __post_init__(self) -> None:
        super().__post_init__()
        load_pairs(self.pairs, self.known)
        if self.weights not in ("singular", "uniform"):
            raise ValueError(f"mask_source.weights must be singular or uniform; got {self.weights!r}")
        if self.k < 1 or self.steps < 1 or self.lr <= 0:
            raise ValueError(f"trusted_subspace needs k >= 1, steps >= 1 and lr > 0; got {self.k}, {self.steps} and {self.lr}")

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        return unknown(view), memory

    def fit(self, policy: Policy) -> Fit:
        """Warm up, read the update, restore. The adapter must be a LoRA of at least rank K."""
        start = {name: value.clone() for name, value in policy.adapter.state().items()}
        before = {name: module.delta(DEPLOYED).detach().clone() for name, module in policy.adapter.modules.items()}
        loss = self._warm_up(policy)
        frames, shares, spectrum = {}, {}, []
        for name, module in policy.adapter.modules.items():
            u, s, _ = torch.linalg.svd((module.delta(DEPLOYED).detach() - before[name]).double(), full_matrices=False)
            if not float(s[0]) > 0:
                raise ValueError(f"the warm-up on clean answers did not move {name}; raise mask_source.steps or mask_source.lr")
            if self.control == "random":
                u = torch.linalg.qr(torch.randn(u.shape, generator=generator_for("random", self.seed, name), dtype=u.dtype)).Q
            k = min(self.k, int((s > 1e-9 * s[0]).sum()))
            frames[name], share = u[:, :k].to(policy.device), s[:k] / s[:k].sum()
            shares[name] = share if self.weights == "singular" else torch.ones_like(share)
            spectrum.append(float(s[:k].square().sum() / s.square().sum()))
        policy.adapter.load_state(start)
        rank = next(iter(policy.adapter.modules.values())).blocks[DEPLOYED]["B"].shape[1]
        dtype = next(iter(before.values())).dtype
        trusted = Trusted({n: u.to(dtype) for n, u in frames.items()}, {n: a.to(dtype) for n, a in shares.items()}, rank)
        return Fit(trusted, {"trusted_energy": sum(spectrum) / len(spectrum), "warm_up_nll": loss})

    def _warm_up(self, policy: Policy) -> float:
        """Train the deployed block on the clean answers; returns the mean NLL that they end with."""
        texts = [(pair.prompt, pair.clean) for pair in load_pairs(self.pairs, self.known)]
        parameters = [p for module in policy.adapter.parameters(DEPLOYED).values() for p in module.values()]
        optimizer = torch.optim.Adam(parameters, self.lr)
        with policy.adapter.only(DEPLOYED):
            for _ in range(self.steps):
                rows = completion_gradients(policy, texts, self.micro_batch)
                policy.adapter.set_gradient({name: g.mean(0).to(parameters[0].dtype) for name, g in rows.items()})
                optimizer.step()
            policy.adapter.set_gradient({})
            return float(clean_nll(policy, texts).mean())


@torch.no_grad()
def clean_nll(policy: Policy, texts: list[tuple[str, str]]) -> Tensor:
    """Mean NLL per token of these completions, [N]."""
    tokens = policy.batch(texts)
    return -policy.log_probs(tokens).sum(1) / tokens.completion_mask.sum(1)
