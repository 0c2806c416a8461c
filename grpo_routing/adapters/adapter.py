"""What every adapter shares: which linears it wraps, its blocks, merging for sampling, and per-rollout parameters.

    y = W x + sum over blocks b of s_b * branch_b(x)

W is frozen. A block can be switched off (s_b = 0): the quarantine at deployment, all blocks for the reference policy.
During the gradient forward each parameter is a leaf with a leading rollout dimension, so that autograd returns one
exact gradient per rollout from one backward (architecture.md §5).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DEPLOYED, QUARANTINE = "deployed", "quarantine"
# The linears of Qwen-style attention and MLP, and of gated delta nets; lm_head and embeddings stay untouched.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
           "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_qkvz", "in_proj_ba", "out_proj")

Parameters = dict[str, Tensor]  # parameter name -> tensor, with a leading rollout dimension during the gradient forward


class AdaptedLinear(nn.Module, ABC):
    """A frozen linear plus the branch of each block. Subclasses say what a block's parameters are and do."""

    def __init__(self, base: nn.Linear, blocks: dict[str, Parameters]) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.blocks = nn.ModuleDict({block: nn.ParameterDict(parameters) for block, parameters in blocks.items()})
        self.live: dict[str, Parameters] = {block: dict(parameters) for block, parameters in self.blocks.items()}
        self.enabled = dict.fromkeys(blocks, True)
        self.merged = False

    @abstractmethod
    def branch(self, x: Tensor, parameters: list[Parameters]) -> Tensor:
        """Contribution of the given blocks to the output; x [b, T, d_in] -> [b, T, d_out]."""

    @abstractmethod
    def delta(self, parameters: list[Parameters]) -> Tensor:
        """The same contribution as a change of W, [d_out, d_in]."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        active = [self.live[block] for block, on in self.enabled.items() if on]
        return y if self.merged or not active else y + self.branch(x, active)


class Adapter:
    """All adapted linears of a model, seen as one set of trainable parameters per block."""

    def __init__(self, modules: dict[str, AdaptedLinear]) -> None:
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
    def only(self, *blocks: str) -> Iterator[None]:
        """Switch every block off but these: `only(DEPLOYED)` ablates the quarantine, `only()` is the reference policy."""
        before = {name: dict(module.enabled) for name, module in self.modules.items()}
        for module in self.modules.values():
            module.enabled = {block: module.enabled[block] and block in blocks for block in module.enabled}
        try:
            yield
        finally:
            for name, module in self.modules.items():
                module.enabled = before[name]

    @contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator[None]:
        """Fold the enabled blocks into W, so that sampling pays nothing for them. W is restored bit for bit."""
        originals = {}
        for name, module in self.modules.items():
            active = [module.live[block] for block, on in module.enabled.items() if on]
            originals[name] = module.weight.data
            if active:
                module.weight.data = module.weight.data + module.delta(active)
            module.merged = True
        try:
            yield
        finally:
            for name, module in self.modules.items():
                module.weight.data = originals[name]
                module.merged = False

    @contextmanager
    def per_rollout(self, rollouts: int, block: str = DEPLOYED) -> Iterator[dict[str, list[Tensor]]]:
        """Give each rollout of a micro-batch its own copy of the block's parameters, as leaves.

        Yields module name -> leaves [rollouts, ...]; after a backward, `flat_gradient` reads them.
        """
        leaves = {}
        for name, module in self.modules.items():
            module.live[block] = {key: p.detach().expand(rollouts, *p.shape).requires_grad_()
                                  for key, p in module.blocks[block].items()}
            leaves[name] = list(module.live[block].values())
        try:
            yield leaves
        finally:
            for module in self.modules.values():
                module.live[block] = dict(module.blocks[block])

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
                parameter.grad = None if piece is None else piece.reshape(parameter.shape).clone()


class _RolloutLinear(torch.autograd.Function):
    """x [b, T, i] times one weight per rollout [b, o, i], all of which are copies of the same one.

    So the forward and the gradient of x are one wide product with the shared weight, and only the weight's gradient is
    taken per rollout: the numbers of a batched product of small matrices at about the price of a plain linear.
    """

    @staticmethod
    def forward(context, x: Tensor, weights: Tensor) -> Tensor:
        context.save_for_backward(x, weights)
        return nn.functional.linear(x, weights[0])

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weights = context.saved_tensors
        return (gradient @ weights[0] if context.needs_input_grad[0] else None), gradient.mT @ x


def rollout_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear without bias whose weight is shared [o, i], or a leaf per rollout [b, o, i] (see `Adapter.per_rollout`)."""
    return nn.functional.linear(x, weight) if weight.ndim == 2 else _RolloutLinear.apply(x, weight)


def flat_gradient(leaves: list[Tensor]) -> Tensor:
    """[b, D] from the leaves of one module. A leaf without gradient was not part of the graph: that is our error."""
    missing = [tuple(leaf.shape) for leaf in leaves if leaf.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached adapter parameters of shape {missing}; is the module used in the forward?")
    flat = torch.cat([leaf.grad.flatten(1) for leaf in leaves], dim=1)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))  # half precision is widened, double kept


def wrap(model: nn.Module, make) -> Adapter:
    """Replace every target linear of `model` by `make(name, linear)` and freeze everything else.

    Raises ValueError when the model has no target linear.
    """
    model.requires_grad_(False)
    modules = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            modules[name] = make(name, module)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, modules[name])
    if not modules:
        raise ValueError(f"the model has no linear named {', '.join(TARGETS)}; add its names to adapters.TARGETS")
    return Adapter(modules)
