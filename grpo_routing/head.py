"""How likely chosen tokens are, from hidden states, without a table of all positions x vocabulary.

    z_t = W h_t                                       logits of position t
    log p_t = z_t[y_t] - logsumexp(z_t)
    d log p_t / d h_t = (onehot(y_t) - softmax(z_t)) W       [d]: only h_t moves log p_t

The derivative is a row as wide as the hidden state, so it is found together with the value, chunk by chunk: no logits wait for the
backward and none are computed twice. W is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK_BYTES = 1 << 28  # of one table of logits in single precision; two are alive at a time. 440 positions at a vocabulary of 152k


def chosen_log_probs(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` [n] after the hidden states [n, d], [n], in single precision at least.

    Raises TypeError for a head that is no linear and ValueError for one that is being trained.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the output head must be a linear without anything after it; got {type(head).__name__}")
    if head.weight.requires_grad:
        raise ValueError("the output head is frozen here, and its weight asks for a gradient; call requires_grad_(False) on the model")
    return _Chosen.apply(hidden, head.weight, head.bias, targets)


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """Positions whose logits are alive together."""
    return max(1, CHUNK_BYTES // (vocabulary * itemsize))


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        picked = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        slopes = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        size = chunk_rows(len(weight), wide.itemsize)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            picked[part] = _chunk(hidden[part], weight, bias, targets[part, None], wide, None if slopes is None else slopes[part])
        context.save_for_backward(slopes)
        return picked

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        slopes, = context.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wide: torch.dtype, slopes: Tensor | None) -> Tensor:
    """log p of some positions; fills their `slopes`. A function, so that its tables are gone before the next ones come."""
    log_probs = torch.log_softmax(nn.functional.linear(hidden, weight, bias), -1, dtype=wide)
    picked = log_probs.gather(1, targets).squeeze(1)
    if slopes is not None:
        apart = log_probs.exp_().neg_()  # onehot - softmax
        apart.scatter_add_(1, targets, torch.ones_like(apart[:, :1]))
        torch.mm(apart.to(weight.dtype), weight, out=slopes)
    return picked
