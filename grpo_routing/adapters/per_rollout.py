"""A parameter with a leading rollout dimension: its product, and how its gradients are read (`Adapter.per_rollout`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _RolloutLinear(torch.autograd.Function):
    """x [b, T, i] times one weight per rollout [b, o, i], all of which are copies of the same one.

    So the forward and the gradient of x are one wide product with the shared weight, and only the weight's gradient is
    taken per rollout: the numbers of a batched product of small matrices at about the price of a plain linear. In half
    precision a product adds up in float32 and is rounded once, so a rollout's gradient is off by at most 2^-9 of each number
    (bfloat16), a tenth of what rounded activations cost it; sums over rollouts are taken in float32.
    """

    @staticmethod
    def forward(context, x: Tensor, weights: Tensor) -> Tensor:
        context.save_for_backward(x, weights)
        return nn.functional.linear(x, weights[0].to(x.dtype))

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weights = context.saved_tensors
        back = gradient @ weights[0].to(x.dtype) if context.needs_input_grad[0] else None
        return back, (gradient.mT @ x).to(weights.dtype)


def rollout_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear without bias in the precision of x. Its weight is shared [o, i], or a leaf per rollout [b, o, i] (see
    `Adapter.per_rollout`); the gradient has the weight's precision."""
    return nn.functional.linear(x, weight.to(x.dtype)) if weight.ndim == 2 else _RolloutLinear.apply(x, weight)


def flat_gradient(leaves: list[Tensor]) -> Tensor:
    """[b, D] from the leaves of one module, which forget it: both would be alive at once. A leaf without gradient was not part of
    the graph: that is our error."""
    missing = [tuple(leaf.shape) for leaf in leaves if leaf.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached adapter parameters of shape {missing}; is the module used in the forward?")
    flat = torch.cat([leaf.grad.flatten(1) for leaf in leaves], dim=1)
    for leaf in leaves:
        leaf.grad = None
    return flat
