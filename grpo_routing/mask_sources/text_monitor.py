"""A monitor of the text alone: naive Bayes on the tokens of the pairs' answers, frozen before the first step (baselines.md F1, G2).

    theta_h(t)   (count of token t in hacking answers + smoothing) / (all of their tokens + smoothing * vocabulary);   theta_c: clean ones
    weight(t)    log theta_h(t) - log theta_c(t)
    score(x)     sum of the weights of x's tokens: the log-odds that x is a hack, at even prior; pool=mean: per token

What stands in the reward under `arm=penalty_text`: pressure by a monitor of the output, after Baker et al. (2025, arXiv:2503.11926), whose
own is a prompted language model that reads a chain of thought. Beside it `arm=penalty_persona` has a probe in the reward. A sum cannot be
diluted by filler, a mean can: that is one of the Atlas' evasions (G1).

Reads authored pairs of known loopholes and the words of the answer; no activation, no gradient, no reward, no truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import generator_for
from grpo_routing.mask_sources.pair_source import PairSource
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.policy import Policy


@dataclass(frozen=True)
class TextMonitor(PairSource):
    smoothing: float  # added to every token's count
    pool: str
    reads = ("pairs", "text")

    def __post_init__(self) -> None:
        if self.smoothing <= 0 or self.pool not in ("sum", "mean"):
            raise ValueError(f"mask_source.smoothing must be positive and mask_source.pool sum or mean; got {self.smoothing} and "
                             f"{self.pool!r}")
        if self.refresh_every:
            raise ValueError(f"text_monitor reads no policy, so reading the same pairs again changes nothing; set "
                             f"mask_source.refresh_every=0 (got {self.refresh_every})")
        super().__post_init__()

    def score(self, view: StepView, memory: Memory) -> tuple[Tensor, Memory]:
        if "weights" not in memory:
            memory = memory | self.fit(view.policy)
        return self.read(view.policy, [rollout.text for rollout in view.rollouts], memory).to(view.rewards.device), memory

    def read(self, policy: Policy, texts: list[str], memory: Memory) -> Tensor:
        """Scores of these answers, [B]; an answer without a token scores 0."""
        weights = memory["weights"].cpu()
        totals = [(weights[list(ids)].sum(), len(ids)) for ids in policy.encode_all(texts)]
        return torch.stack([total / max(count, 1) if self.pool == "mean" else total for total, count in totals])

    def fit(self, policy: Policy) -> Memory:
        """Weights [V] from the pairs that are not kept aside; of those, the share whose hack scores above its clean answer."""
        pairs, size = self.load(), policy.model.get_input_embeddings().num_embeddings
        reserved, first, second = self.reserved(len(pairs)), *self._sides(policy)
        rows = [row for row in range(len(pairs)) if row not in reserved]
        hack, clean = (log_shares([side[row] for row in rows], size, self.smoothing) for side in (first, second))
        weights = hack - clean
        if self.control == "haar":
            draw = torch.randn(size, generator=generator_for("haar", self.seed, "text"), dtype=torch.float64)
            weights = draw * (weights.norm() / draw.norm())
        memory: Memory = {"weights": weights}
        if reserved:
            ahead = [weights[list(first[row])].sum() > weights[list(second[row])].sum() for row in reserved]
            memory["separation"] = torch.stack(ahead).double().mean()
        return memory

    def _sides(self, policy: Policy) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Tokens of the first and of the second answers, one entry per pair."""
        pairs = self.load()
        texts = [text for pair in pairs for text in (getattr(pair, self.first), pair.clean)]
        order = self.dealt(len(pairs)) if self.control == "shuffled" else [*range(0, len(texts), 2), *range(1, len(texts), 2)]
        ids = policy.encode_all(texts)
        return [ids[at] for at in order[: len(pairs)]], [ids[at] for at in order[len(pairs) :]]


def log_shares(answers: list[tuple[int, ...]], size: int, smoothing: float) -> Tensor:
    """Log of every token's smoothed share of these answers, [V]."""
    counts = torch.bincount(torch.tensor([token for ids in answers for token in ids]), minlength=size).double() + smoothing
    return (counts / counts.sum()).log()
