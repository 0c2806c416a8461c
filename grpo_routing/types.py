"""The nouns that cross rooms. Frozen; each checks its shapes when made.

Shapes: B rollouts, P prompts, G rollouts of a prompt, T tokens, D trainable numbers of a module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt. `sampler_log_probs` is empty for rollouts that this policy did not sample."""

    group: int  # index of the prompt within the step
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends with the end token if the policy stopped by itself
    text: str  # the completion, decoded without special tokens
    source: str  # STUDENT or TEACHER
    sampler_log_probs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in (STUDENT, TEACHER):
            raise ValueError(f"a rollout's source is {STUDENT!r} or {TEACHER!r}; got {self.source!r}")
        if not self.completion_ids:
            raise ValueError("a rollout needs at least one completion token; got none")
        if self.sampler_log_probs and len(self.sampler_log_probs) != len(self.completion_ids):
            raise ValueError(f"expected one sampler log-prob per completion token; got {len(self.sampler_log_probs)} "
                             f"for {len(self.completion_ids)} tokens")


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded prompt + completion tokens. Masks are carried, not inferred: the end token may equal padding."""

    ids: Tensor  # [B, T] long
    completion_mask: Tensor  # [B, T-1] bool; position t is True where ids[:, t+1] is a completion token

    def __post_init__(self) -> None:
        expected = (self.ids.shape[0], self.ids.shape[1] - 1)
        if tuple(self.completion_mask.shape) != expected:
            raise ValueError(f"completion_mask is {list(self.completion_mask.shape)} but ids is {list(self.ids.shape)}; "
                             f"the mask must be one shorter than ids")

    @staticmethod
    def of(sequences: list[tuple[tuple[int, ...], tuple[int, ...]]], pad: int, device: torch.device | str = "cpu") -> TokenBatch:
        """Build from (prompt ids, completion ids) pairs."""
        width = max(len(prompt) + len(completion) for prompt, completion in sequences)
        ids = torch.full((len(sequences), width), pad)
        mask = torch.zeros((len(sequences), width - 1), dtype=torch.bool)
        for row, (prompt, completion) in enumerate(sequences):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor(prompt + completion)
            mask[row, len(prompt) - 1 : end - 1] = True
        return TokenBatch(ids.to(device), mask.to(device))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: list[int]) -> TokenBatch:
        """These rows, cut to the width that they need."""
        ids, mask = self.ids[chosen], self.completion_mask[chosen]
        width = int(mask.any(0).nonzero().max()) + 2
        return TokenBatch(ids[:, :width], mask[:, : width - 1])


@dataclass(frozen=True)
class RolloutGrads:
    """One exact gradient per rollout and module, all from one backward (architecture.md §5)."""

    modules: dict[str, Tensor]  # name -> [B, D_module], float32

    def __post_init__(self) -> None:
        counts = {len(rows) for rows in self.modules.values()}
        if len(counts) != 1:
            raise ValueError(f"every module needs the same number of rollouts; got {sorted(counts)}")

    def summed(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Gradient of the batch, or of the rows where the boolean [B] mask is True."""
        return {name: (grad if rows is None else grad[rows]).sum(0) for name, grad in self.modules.items()}


@dataclass(frozen=True)
class Basis:
    """Orthonormal hack-oriented rows per module; a subspace mask source returns one. Modules without rows are absent."""

    modules: dict[str, Tensor]  # name -> [k, D_module]

    def __post_init__(self) -> None:
        for name, rows in self.modules.items():
            if rows.ndim != 2 or rows.shape[0] > rows.shape[1]:
                raise ValueError(f"basis of {name} must be [k, D] with k <= D; got {list(rows.shape)}")
            gram = rows @ rows.T
            if not torch.allclose(gram, torch.eye(len(rows), dtype=rows.dtype, device=rows.device), atol=1e-4):
                raise ValueError(f"basis of {name} is not orthonormal (largest error {(gram - torch.eye(len(rows))).abs().max():.1e})")
