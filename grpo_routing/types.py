"""The nouns that cross rooms. Frozen; each checks its shapes when made.

Shapes: B rollouts, P prompts, G rollouts of a prompt, T tokens, D trainable numbers of a module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_routing.parallel import ALONE, World

STUDENT, TEACHER, ANCHOR = "student", "teacher", "anchor"


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt. `sampler_log_probs` is empty for rollouts that this policy did not sample."""

    group: int  # index of the prompt within the step
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends with the end token if the policy stopped by itself
    text: str  # the completion, decoded without special tokens
    source: str  # STUDENT, TEACHER or ANCHOR
    sampler_log_probs: tuple[float, ...] = ()
    quarantine: float = 1.0  # forward scale of the quarantine, when it was sampled and whenever it is scored

    def __post_init__(self) -> None:
        if self.source not in (STUDENT, TEACHER, ANCHOR):
            raise ValueError(f"a rollout's source is {STUDENT!r}, {TEACHER!r} or {ANCHOR!r}; got {self.source!r}")
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

    def lengths(self) -> Tensor:
        """Tokens of each row up to the last of its completion, [B]."""
        return self.ids.shape[1] - self.completion_mask.flip(1).int().argmax(1)

    def prompts(self) -> list[tuple[int, ...]]:
        """The prompt ids of every row."""
        starts = (self.completion_mask.int().argmax(1) + 1).tolist()
        return [tuple(row[:start]) for row, start in zip(self.ids.tolist(), starts)]

    def groups(self, chosen: list[list[int]]) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """(prompt ids, the ids of these completions of it), as `Packed.of` takes them. The rows of a group have one prompt."""
        rows, ends = self.ids.tolist(), self.lengths().tolist()
        prompts = self.prompts()
        return [(prompts[group[0]], [tuple(rows[row][len(prompts[row]) : ends[row]]) for row in group]) for group in chosen]

    def rows(self, chosen: list[int]) -> TokenBatch:
        """These rows, cut to the width that they need."""
        ids, mask = self.ids[chosen], self.completion_mask[chosen]
        width = int(mask.any(0).nonzero().max()) + 2
        return TokenBatch(ids[:, :width], mask[:, : width - 1])


@dataclass(frozen=True)
class Packed:
    """Completions of one prompt in a row, which share the prompt's forward and backward.

        row         prompt | first | second | ... | padding
        positions   every completion continues the prompt; attention hides the completions from each other

    So a sum of losses of the completions has the gradient that rows of their own would give it, for fewer tokens.
    """

    ids: Tensor  # [b, T] long
    positions: Tensor  # [b, T] long
    segment: Tensor  # [b, T] long: 0 prompt, 1, 2, ... the completions, -1 padding
    previous: Tensor  # [b, T] long: the place whose hidden state predicts this token

    @staticmethod
    def of(groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]], pad: int, device: torch.device | str = "cpu") -> Packed:
        """Build from (prompt ids, the ids of its completions)."""
        width = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
        shape = (len(groups), width)
        ids, segment = torch.full(shape, pad), torch.full(shape, -1)
        positions = torch.arange(width).repeat(len(groups), 1)
        previous = (positions - 1).clamp_min(0)
        for row, (prompt, completions) in enumerate(groups):
            start = end = len(prompt)
            ids[row, :start], segment[row, :start] = torch.tensor(prompt), 0
            for number, completion in enumerate(completions, 1):
                place, end = slice(end, end + len(completion)), end + len(completion)
                ids[row, place], segment[row, place] = torch.tensor(completion), number
                positions[row, place] = torch.arange(start, start + len(completion))
                previous[row, place.start] = start - 1
        return Packed(*(tensor.to(device) for tensor in (ids, positions, segment, previous)))

    def attention(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [b, 1, T, T]: causal, over the prompt and the own completion; padding sees only the prompt and padding."""
        width = self.ids.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).tril()
        own = (self.segment[:, :, None] == self.segment[:, None, :]) | (self.segment[:, None, :] == 0)
        mask = torch.zeros(len(self.ids), width, width, dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~(seen & own), torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class RolloutGrads:
    """One exact gradient of a block per rollout and module, all from one backward (architecture.md §5).

    Of a run in several processes each holds the rows that it computed alone; what is asked of them is of all.
    """

    modules: dict[str, Tensor]  # name -> [B, D_module], float32
    world: World = ALONE
    own: Tensor | None = None  # bool [B]: the rollouts whose rows are here, in their order; None is all

    def __post_init__(self) -> None:
        counts = {len(rows) for rows in self.modules.values()} | (set() if self.own is None else {int(self.own.sum())})
        if len(counts) != 1:
            raise ValueError(f"every module needs the same number of rollouts; got {sorted(counts)}")

    def everyones(self, at: str, values: Tensor) -> Tensor:
        """Of values of the rows that are here [n, ...], those of all rollouts [B, ...]."""
        if self.own is None:
            return values
        spread = values.new_zeros(len(self.own), *values.shape[1:])
        spread[self.own] = values
        return self.world.sum(at, spread)

    def summed(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Gradient of the batch; `weights` [B] (or a boolean choice of rows) multiply the rollouts. All ones change no bit."""
        if weights is None:
            weights = torch.ones(len(next(iter(self.modules.values()))))
        elif self.own is not None:
            weights = weights[self.own]
        return self.world.sums("gradients", {name: weighted(grad, weights) for name, grad in self.modules.items()})

    def answer(self, asked: Asked, factors: Tensor) -> RolloutSums:
        """What is asked of these gradients times one factor per rollout [B], such as the advantage of each; no product is stored."""
        known = asked.axes is not None
        return RolloutSums(asked, [self.summed(factors if bool((weights == 1).all()) else weights * factors) for weights in asked.sums],
                           self.norms() * factors.abs() if known else None, self.along(asked.axes) * factors if known else None)

    def norms(self) -> Tensor:
        """Length of each rollout's whole gradient, [B]."""
        return self.everyones("norms", torch.stack([grad.square().sum(1) for grad in self.modules.values()]).sum(0)).sqrt()

    def along(self, axes: dict[str, Tensor]) -> Tensor:
        """Inner product of each rollout's gradient with one axis [D] per module, [B]."""
        return self.everyones("along", torch.stack([self.modules[name] @ axis for name, axis in axes.items()]).sum(0))


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights[i] rows[i], [B, D] -> [D]; ones are a plain sum."""
    return rows.sum(0) if bool((weights == 1).all()) else weights.to(rows) @ rows


@dataclass(frozen=True)
class Asked:
    """What is asked of the gradients of one block before the backward, so that no rollout's own gradient need be kept."""

    sums: list[Tensor]  # weights [B] of each sum
    axes: dict[str, Tensor] | None = None  # module -> [D]; with them, `norms` and `along` are known too, nan where not
    of: Tensor | None = None  # bool [B]: the rollouts that the axes are asked of; None is all


@dataclass(frozen=True)
class RolloutSums:
    """Sums of the rollouts' gradients of a block, of which memory holds one micro-batch at a time; answers what was asked."""

    asked: Asked
    sums: list[dict[str, Tensor]]  # as asked: name -> [D], float32
    lengths: Tensor | None  # [B], and
    inner: Tensor | None  # [B], with asked.axes

    def summed(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """As `RolloutGrads.summed`. Raises ValueError for a sum that was not asked for."""
        for own, modules in zip(self.asked.sums, self.sums, strict=True):
            if bool((own == 1).all() if weights is None else torch.equal(own, weights.to(own))):
                return modules
        raise ValueError(f"the rollouts' gradients were summed with {len(self.asked.sums)} sets of weights and not kept; these weights are "
                         f"not among them. Add them to what decision.asked asks for")

    def norms(self) -> Tensor:
        if self.asked.axes is None:
            raise ValueError("the lengths of the rollouts' gradients were not asked for, and the gradients were not kept")
        return self.lengths

    def along(self, axes: dict[str, Tensor]) -> Tensor:
        known = self.asked.axes
        if known is None or known.keys() != axes.keys() or not all(torch.equal(known[name], axis) for name, axis in axes.items()):
            raise ValueError("the inner products with these axes were not asked for, and the rollouts' gradients were not kept")
        return self.inner


@dataclass(frozen=True)
class Labels:
    """What a mask source says about each rollout, [B]. Neither flagged nor trusted is unknown: it may train both blocks."""

    flagged: Tensor  # probability in [0, 1] that the rollout is a hack
    trusted: Tensor  # bool: confidently clean, so it may train the deployed block only
    scores: Tensor | None = None  # what the flags were calibrated from, nan where it cannot say; for the diagnosis only

    def __post_init__(self) -> None:
        if self.flagged.ndim != 1 or self.flagged.shape != self.trusted.shape:
            raise ValueError(f"labels are [B] each; got flagged {list(self.flagged.shape)} and trusted {list(self.trusted.shape)}")
        if not bool(((self.flagged >= 0) & (self.flagged <= 1)).all()):
            raise ValueError(f"flag probabilities lie in [0, 1]; got {self.flagged.min():.3g} to {self.flagged.max():.3g}")
        if bool((self.trusted & (self.flagged > 0)).any()):
            raise ValueError("a rollout cannot be both flagged and trusted; a source must choose")

    @staticmethod
    def of(flagged: Tensor) -> Labels:
        """Flags alone; nothing is trusted."""
        return Labels(flagged, torch.zeros(len(flagged), dtype=torch.bool, device=flagged.device))

    def at(self, rows: Tensor) -> Labels:
        """The labels of other rollouts: row i gets those of rows[i]."""
        return Labels(self.flagged[rows], self.trusted[rows], None if self.scores is None else self.scores[rows])


@dataclass(frozen=True)
class Weights:
    """What a rollout's label does to its gradient, [B] per block: 0 leaves the block alone."""

    deployed: Tensor
    quarantine: Tensor

    def of(self, block: str) -> Tensor:
        return getattr(self, block)


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


@dataclass(frozen=True)
class Trusted:
    """What a trusted-subspace source gives (TDGA): the output directions per module in which a clean update moved.

    Modules are low-rank updates B A whose flat vector is [A | B], so that the last d_out * rank numbers are B [d_out, rank].
    """

    modules: dict[str, Tensor]  # name -> U [d_out, K], orthonormal columns
    weights: dict[str, Tensor]  # name -> [K], the share of each direction; they sum to 1, or are all 1
    rank: int

    def __post_init__(self) -> None:
        for name, frame in self.modules.items():
            gram = frame.T @ frame
            if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=1e-4):
                raise ValueError(f"the trusted directions of {name} are not orthonormal")
            if self.weights[name].shape != frame.shape[1:]:
                raise ValueError(f"{name} has {frame.shape[1]} trusted directions and {len(self.weights[name])} weights")
