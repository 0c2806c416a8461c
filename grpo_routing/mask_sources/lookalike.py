"""Labels spread to look-alikes: rollouts that resemble flagged ones in the frozen model's own representation are flagged too.

    pilot      before step 0 the untrained policy answers `pilot` batches of training prompts, and the detector flags them
    phi(x)     hidden states of the frozen model (adapter off), mean over the completion's tokens, at the named layers
    g(x)       ridge logistic regression of the pilot's flags on phi, standardised
    flagged    the detector's own flags, and every rollout with g(x) above the 1 - top_share quantile of the *unflagged* pilot

A detector that misses half of the hacks at random still says where hacks lie: P(flag | x) = recall * P(hack | x), so ranking by
g ranks by P(hack | x) whatever the recall (Elkan & Noto 2008, "Learning classifiers from only positive and unlabeled data",
lemma 1). The probe is frozen: refitted on what RL makes of the policy, it would learn from unflagged hacks, of held-out
loopholes above all, that they are clean. A strong ridge keeps it near the direction that flagged rollouts share; how strong
can be chosen without the held-out loophole, by leaving a known one out (docs/log.md).

Reads code through the detector, and activations; no reward, no truth. A held-out loophole is caught only as far as it looks
like the known ones.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_routing.mask_sources.detector import Detector
from grpo_routing.mask_sources.view import Memory, StepView
from grpo_routing.types import Labels

log = logging.getLogger("grpo_routing")
ROUNDS = 12  # Newton steps; the ridge makes the problem strictly convex


@dataclass(frozen=True)
class Lookalike(Detector):
    pilot: int  # batches of the untrained policy that the probe is fitted on
    layers: tuple[int, ...]  # hidden states: 0 is the embedding, -1 the last layer
    ridge: float  # penalty on the standardised weights, per rollout
    top_share: float  # share of the unflagged pilot rollouts that the threshold flags
    reads = ("code", "activations")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pilot < 1 or not self.layers or self.ridge <= 0 or not 0 < self.top_share < 1:
            raise ValueError(f"lookalike needs pilot >= 1, some layers, ridge > 0 and top_share between 0 and 1; got {self.pilot}, "
                             f"{list(self.layers)}, {self.ridge}, {self.top_share}")

    @property
    def pilot_batches(self) -> int:
        return self.pilot

    def prepare(self, views: list[StepView]) -> Memory:
        """The probe, from the pilot. When the detector flagged nothing there, or everything, a warning says that it speaks alone."""
        features = torch.cat([self.features(view) for view in views])
        flags = torch.cat([self.flags(view) for view in views])
        if not 0 < int(flags.sum()) < len(flags):
            log.warning("lookalike needs flagged and unflagged pilot rollouts; the detector flagged %d of %d and will speak alone. "
                        "Raise mask_source.pilot or mask_source.recall", int(flags.sum()), len(flags))
            nothing = torch.zeros_like(features[0])
            return {"weights": nothing, "centre": nothing.clone(), "threshold": torch.tensor(torch.inf, dtype=features.dtype)}
        centre, spread = features.mean(0), features.std(0).clamp_min(1e-6)
        weights = logistic((features - centre) / spread, flags.double(), self.ridge)
        probe = {"weights": weights / spread, "centre": centre}
        return probe | {"threshold": score(probe, features)[~flags].quantile(1 - self.top_share)}

    def judge(self, view: StepView, memory: Memory) -> tuple[Labels, Memory]:
        """Flagged by the detector or by the probe."""
        scores = score(memory, self.features(view))
        alike = self.flags(view) | (scores >= memory["threshold"]).cpu()
        return replace(Labels.of(alike.to(view.rewards)), scores=scores), memory

    def features(self, view: StepView) -> Tensor:
        return view.policy.pooled_hidden(view.tokens, self.layers).double()


def score(probe: Memory, features: Tensor) -> Tensor:
    """How much rollouts look like flagged ones, [B]; the bias does not matter to a threshold that is a quantile."""
    return (features - probe["centre"]) @ probe["weights"]


def logistic(z: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge logistic regression of y [N] on standardised z [N, d] by Newton's method: weights [d]. The penalty is
    ridge * N / 2 |w|^2, not on the bias. Where d > N, w lies in the span of the rows and is sought there."""
    turn = torch.linalg.qr(z.T).Q if z.shape[1] > len(z) else None  # [d, N]
    x = torch.cat([z if turn is None else z @ turn, z.new_ones(len(z), 1)], 1)
    penalty = x.new_full((x.shape[1],), ridge * len(x))
    penalty[-1] = 1e-9
    weights = x.new_zeros(x.shape[1])
    for _ in range(ROUNDS):
        mean = torch.sigmoid(x @ weights)
        curvature = (x * (mean * (1 - mean)).clamp_min(1e-6)[:, None]).T @ x + torch.diag(penalty)
        weights = weights - torch.linalg.solve(curvature, x.T @ (mean - y) + penalty * weights)
    return weights[:-1] if turn is None else turn @ weights[:-1]
