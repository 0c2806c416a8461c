"""What every adapter shares: which modules it wraps, its blocks, merging for sampling, and per-rollout parameters.

    y = base(x) + sum over blocks b of s_b * branch_b(x)

The base is frozen. s_b is the block's forward scale: 0 switches it off (the quarantine at deployment, all blocks for the
reference policy), a number in between deploys a part of it, and during the gradient forward it may differ by rollout
(SGTM's clean rollouts and anchors run with the quarantine off). There, each parameter is a leaf with a leading
rollout dimension, so that autograd returns one exact gradient per rollout from one backward (architecture.md §5).

Beside a base in half precision the parameters are float32, and so are their gradients' sums, the optimizer's moments and steps:
a bfloat16 number near 1 moves by 2^-8 or not at all, and an AdamW step is far smaller. A branch is computed in the precision of
its input, with the parameters rounded for each product: products of half precision are the fast ones, and activations in float32
would be twice the memory (PEFT, whose adapters are float32 too, widens them). What that rounds off is in the parameter still, and
shows once it has grown. Folding adds in float32 and rounds the sum. With a base in float32 nothing is rounded, and no bit changes.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor, nn

DEPLOYED, QUARANTINE = "deployed", "quarantine"
# The linears of Qwen-style attention and MLP, and of gated delta nets; lm_head and embeddings stay untouched.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_qkvz", "in_proj_ba", "out_proj")

EXPERTS = {"experts", "shared_expert", "shared_experts"}  # see tokens in one heap, of which no row is a rollout: they stay frozen

Parameters = dict[str, Tensor]  # parameter name -> tensor, with a leading rollout dimension during the gradient forward
Leaves = dict[str, dict[str, list[Tensor]]]  # block -> module -> leaves [b, ...]


class AdaptedModule(nn.Module, ABC):
    """A frozen module plus the branch of each block. Subclasses say what a block's parameters are and do."""

    def __init__(self, blocks: dict[str, Parameters]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({block: nn.ParameterDict(parameters) for block, parameters in blocks.items()})
        self.live: dict[str, Parameters] = {block: dict(parameters) for block, parameters in self.blocks.items()}
        self.scale: dict[str, float | Tensor] = dict.fromkeys(blocks, 1.0)  # a tensor is [b], one number per rollout
        self.passes: dict[str, Tensor] = {}  # block -> [b], the share of its gradient that the branch lets through
        self.stop_at = "output"  # where `passes` acts
        self.hidden: dict[str, Tensor] | None = None  # block -> [b, T, r], kept while somebody watches
        self.gates: dict[str, Tensor] | None = None  # block -> logits [b, T], of an input-conditioned gate
        self.folded: tuple[str, ...] = ()

    @abstractmethod
    def base(self, x: Tensor) -> Tensor:
        """The frozen module; with the folded branches while merged."""

    @abstractmethod
    def branch(self, x: Tensor, block: str) -> Tensor:
        """Contribution of a block's live parameters to the output at scale 1; x [b, T, d_in] -> [b, T, d_out]."""

    @abstractmethod
    def fold(self, blocks: dict[str, float]) -> None:
        """Put these blocks at these scales into the frozen weights, to one rounding of their sum."""

    @abstractmethod
    def unfold(self) -> None:
        """Undo `fold`, bit for bit."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """A module of the frozen one's kind, without blocks, that keeps what is folded now when it is unfolded here."""

    def foldable(self, block: str) -> bool:
        """Whether the branch is a change of weights; one behind a gate is not."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        y, active = self.base(x), [block for block in self.active() if block not in self.folded]
        return y + self.branches(x, active) if active else y

    def active(self) -> list[str]:
        return [block for block, scale in self.scale.items() if isinstance(scale, Tensor) or scale != 0.0]

    def branches(self, x: Tensor, active: list[str]) -> Tensor:
        return reduce(torch.add, [self._scaled(x, block) for block in active])

    def _scaled(self, x: Tensor, block: str) -> Tensor:
        out, scale = self.branch(x, block), self.scale[block]
        if block in self.passes and self.stop_at == "output":
            out = let_through(out, self.passes[block])
        if isinstance(scale, Tensor):
            return scale[:, None, None].to(out.dtype) * out
        return out if scale == 1.0 else scale * out

    def inner(self, block: str, hidden: Tensor) -> Tensor:
        """What a branch computes between its two halves, [b, T, r]: watched, and stopped here for `stop_at: bottleneck`."""
        if self.hidden is not None:
            self.hidden[block] = hidden
        return let_through(hidden, self.passes[block]) if block in self.passes and self.stop_at == "bottleneck" else hidden


def let_through(value: Tensor, passes: Tensor) -> Tensor:
    """The same value with `passes` [b] of its gradient: M a + (1 - M) stopgrad(a) (routing.md §1.2).

    Exact for 0 and 1, where a plain choice keeps the bits and what is not finite; other shares cost one rounding.
    """
    share = passes[:, None, None]
    if bool(((passes == 0) | (passes == 1)).all()):
        return torch.where(share == 1, value, value.detach())
    share = share.to(value.dtype)
    return share * value + (1 - share) * value.detach()


class AdaptedLinear(AdaptedModule):
    """A frozen linear; `delta` says what a block adds to W."""

    def __init__(self, base: nn.Linear, blocks: dict[str, Parameters]) -> None:
        super().__init__(blocks)
        self.weight, self.bias = base.weight, base.bias
        self.original: Tensor | None = None

    @abstractmethod
    def delta(self, block: str) -> Tensor:
        """The block's contribution at scale 1 as a change of W, [d_out, d_in], in the parameters' precision."""

    def base(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def fold(self, blocks: dict[str, float]) -> None:
        self.original = self.weight.data
        if blocks:
            deltas = [self.delta(block) if scale == 1.0 else scale * self.delta(block) for block, scale in blocks.items()]
            self.weight.data = (self.weight.data + reduce(torch.add, deltas)).to(self.weight.dtype)

    def unfold(self) -> None:
        self.weight.data, self.original = self.original, None

    def plain(self) -> nn.Linear:
        linear = nn.Linear(*reversed(self.weight.shape), bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.data, requires_grad=False), self.bias
        return linear


class Adapter:
    """All adapted modules of a model, seen as one set of trainable parameters per block."""

    def __init__(self, modules: dict[str, AdaptedModule]) -> None:
        self.modules = modules
        self.blocks = tuple(next(iter(modules.values())).blocks)

    @property
    def has_quarantine(self) -> bool:
        return QUARANTINE in self.blocks

    def parameters(self, block: str = DEPLOYED) -> dict[str, dict[str, nn.Parameter]]:
        """module name -> parameter name -> parameter."""
        return {name: dict(module.blocks[block]) for name, module in self.modules.items()}

    def size(self, block: str = DEPLOYED) -> int:
        return sum(p.numel() for module in self.parameters(block).values() for p in module.values())

    def norm(self, block: str) -> float:
        squares = [p.detach().float().square().sum() for m in self.parameters(block).values() for p in m.values()]
        return math.sqrt(float(torch.stack(squares).sum()))

    def state(self) -> dict[str, Tensor]:
        return {f"{block}/{name}/{key}": p.detach()
                for block in self.blocks for name, module in self.parameters(block).items() for key, p in module.items()}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for key, tensor in sorted(self.state().items()):
            digest.update(key.encode() + tensor.cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        own = self.state()
        if own.keys() != state.keys():
            raise ValueError(f"adapter state does not fit: missing {sorted(own.keys() - state.keys())[:3]}, "
                             f"unknown {sorted(state.keys() - own.keys())[:3]}")
        for key, tensor in own.items():
            tensor.copy_(state[key])

    @contextmanager
    def scaled(self, scales: dict[str, float]) -> Iterator[None]:
        """Multiply the forward scale of these blocks: `scaled({QUARANTINE: 0.3})` deploys three tenths of the quarantine."""
        if unknown := scales.keys() - set(self.blocks):
            raise ValueError(f"the adapter has the blocks {', '.join(self.blocks)}; got {', '.join(sorted(unknown))}")
        before = {name: dict(module.scale) for name, module in self.modules.items()}
        for module in self.modules.values():
            module.scale = {block: scale * scales[block] if block in scales else scale for block, scale in module.scale.items()}
        try:
            yield
        finally:
            for name, module in self.modules.items():
                module.scale = before[name]

    def only(self, *blocks: str):
        """Switch every block off but these: `only(DEPLOYED)` ablates the quarantine, `only()` is the reference policy."""
        return self.scaled({block: 0.0 for block in self.blocks if block not in blocks})

    @contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator[None]:
        """Fold the active blocks into the frozen weights, so that sampling pays nothing for them; undone bit for bit.
        Blocks behind a gate stay where they are."""
        done: list[AdaptedModule] = []
        try:
            for module in self.modules.values():
                own = tuple(block for block in module.active() if module.foldable(block))
                module.fold({block: module.scale[block] for block in own})
                module.folded = own
                done.append(module)
            yield
        finally:
            for module in done:
                module.unfold()
                module.folded = ()

    @contextmanager
    def per_rollout(self, rollouts: int, blocks: tuple[str, ...] = (DEPLOYED,), quarantine: Tensor | None = None,
                    passes: dict[str, Tensor] | None = None, stop_at: str = "output") -> Iterator[Leaves]:
        """Give each rollout of a micro-batch its own copy of the blocks' parameters, as leaves.

        `quarantine` [rollouts] is the forward scale of the quarantine per rollout, `passes` block -> [rollouts] the share of
        the gradient that a block's branch lets through. Yields the leaves; after a backward, `flat_gradient` reads them.
        """
        leaves: Leaves = {block: {} for block in blocks}
        before = {name: dict(module.scale) for name, module in self.modules.items()}
        for name, module in self.modules.items():
            for block in blocks:
                module.live[block] = {key: p.detach().expand(rollouts, *p.shape).requires_grad_()
                                      for key, p in module.blocks[block].items()}
                leaves[block][name] = list(module.live[block].values())
            if quarantine is not None and QUARANTINE in module.scale:
                module.scale[QUARANTINE] = module.scale[QUARANTINE] * quarantine
            module.passes, module.stop_at = passes or {}, stop_at
        try:
            yield leaves
        finally:
            for name, module in self.modules.items():
                module.live = {block: dict(parameters) for block, parameters in module.blocks.items()}
                module.scale, module.passes = before[name], {}

    @contextmanager
    def watched(self) -> Iterator[dict[str, AdaptedModule]]:
        """Keep what every branch computes inside (`module.hidden`, `module.gates`) during the forwards of this context."""
        for module in self.modules.values():
            module.hidden, module.gates = {}, {}
        try:
            yield self.modules
        finally:
            for module in self.modules.values():
                module.hidden = module.gates = None

    def flatten(self, block: str = DEPLOYED) -> dict[str, Tensor]:
        """module name -> [D], the block's parameters as one vector per module (a copy)."""
        return {name: torch.cat([p.detach().flatten() for p in module.values()]) for name, module in self.parameters(block).items()}

    @torch.no_grad()
    def load_flat(self, vectors: dict[str, Tensor], block: str = DEPLOYED) -> None:
        """The inverse of `flatten`."""
        for name, module in self.parameters(block).items():
            for parameter, piece in zip(module.values(), vectors[name].split([p.numel() for p in module.values()])):
                parameter.copy_(piece.reshape(parameter.shape))

    def set_gradient(self, gradients: dict[str, Tensor], block: str = DEPLOYED) -> None:
        """Write flat per-module gradients [D] into `.grad`; modules that are absent get none."""
        for name, module in self.parameters(block).items():
            flat = gradients.get(name)
            pieces = [None] * len(module) if flat is None else flat.split([p.numel() for p in module.values()])
            for parameter, piece in zip(module.values(), pieces):
                parameter.grad = None if piece is None else piece.reshape(parameter.shape).to(parameter.dtype, copy=True)


def trainable(start: Tensor, beside: Tensor) -> nn.Parameter:
    """A parameter that starts as `start`, on the device of the frozen weight `beside` and in its precision, but never in less than
    float32."""
    return nn.Parameter(start.to(beside.device, torch.promote_types(beside.dtype, torch.float32)))


def generator_for(*name: object) -> torch.Generator:
    """A generator of its own for a named draw, such as ("lora", seed, module): nothing else can shift it."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def is_target(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS and not is_expert(name)


def is_expert(name: str) -> bool:
    """Whether a module is a part of a mixture of experts."""
    return not EXPERTS.isdisjoint(name.split("."))


def wrap(model: nn.Module, make, target=is_target, wanted: str = f"linear named {', '.join(TARGETS)}") -> Adapter:
    """Replace every target module of `model` by `make(name, module)` and freeze everything else.

    Raises ValueError when the model has no target.
    """
    model.requires_grad_(False)
    modules = {}
    for name, module in list(model.named_modules()):
        if target(name, module):
            modules[name] = make(name, module)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, modules[name])
    if not modules:
        raise ValueError(f"the model has no {wanted}; add its names to adapters.TARGETS")
    return Adapter(modules)
