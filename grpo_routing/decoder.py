"""One token for every live row: the decode step of sampling, with the prompts' keys and values shared by their groups.

transformers' forward spends its time on Python. Here a layer is written out for the dense Qwen and Llama shapes, and there are two ways
to look back. After short prompts every row has its prompt's cache before its own (`Repeated`). After long ones a prompt's cache is read
once for all rows of its group (`Shared`). `Cached` is the same for every other architecture, and while somebody has hooked a layer:
transformers' forward with a repeated cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from grpo_routing.adapters.adapter import AdaptedLinear, AdaptedModule

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

DENSE = ("qwen3", "qwen2", "llama")  # model_type of the shapes that are written out
SHORT = 64  # tokens of the longest prompt, up to which an attention in two parts costs more than a repeated cache
SMALL = 1 << 20  # numbers of a weight, up to which the call costs more than the product, so that products are joined
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # rotations that depend on the position alone


class Decoder(Protocol):
    def keep(self, going: Tensor) -> None:
        """Only these of the rows go on, in their order."""

    def next(self, token: Tensor) -> Tensor:
        """Logits [n, V] after each row's next token [n]."""


def decoder(model: PreTrainedModel, cache: DynamicCache, mask: Tensor, groups: Tensor, longest: int) -> Decoder:
    """Of rows that continue prefilled prompts: cache and mask [P, L] are those of the prompts, padded on the left; groups [n] says which
    prompt each row continues, in ascending order; no row gets more than `longest` tokens."""
    kind = Cached if not shareable(model) else Repeated if mask.shape[1] <= SHORT else Shared
    return kind(model, cache, mask, groups, longest)


def shareable(model: PreTrainedModel) -> bool:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    windows = getattr(config, "layer_types", None) or ["full_attention"]
    hooked = any(_hooked(module) for layer in model.get_decoder().layers if hasattr(layer, "self_attn")
                 for module in (layer, layer.self_attn, layer.mlp))
    return (config.model_type in DENSE and set(windows) == {"full_attention"} and rope.get("rope_type", "default") in STATIC_ROPE
            and not hooked)


def _hooked(module: nn.Module) -> bool:
    """By somebody. transformers leaves its own hooks behind at the first call for hidden states, which do nothing outside such a call: a
    run that went on would decode by another path than the one that resumed it."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


class Cached:
    """transformers' forward, every prompt's cache repeated over its rows."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, groups: Tensor, longest: int) -> None:
        cache.reorder_cache(groups)  # and not batch_select_indices, which layers with a recurrent state lack
        self.model, self.cache, self.mask, self.position = model, cache, mask[groups], mask.sum(1)[groups] - 1

    def keep(self, going: Tensor) -> None:
        self.mask, self.position = self.mask[going], self.position[going]
        self.cache.reorder_cache(going)

    def next(self, token: Tensor) -> Tensor:
        self.position, self.mask = self.position + 1, torch.cat([self.mask, self.mask.new_ones(len(token), 1)], 1)
        return self.model(input_ids=token[:, None], attention_mask=self.mask, position_ids=self.position[:, None],
                          past_key_values=self.cache, use_cache=True).logits[:, -1]


class Written(ABC):
    """The layers written out, around what a row attends to."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, groups: Tensor, longest: int) -> None:
        self.core, self.head = model.get_decoder(), model.get_output_embeddings()
        self.kv_heads, self.heads = model.config.num_key_value_heads, model.config.num_attention_heads
        self.layers, self.norm = [_Layer(layer, self.heads, self.kv_heads) for layer in self.core.layers], _norm(self.core.norm)
        self.lengths, self.step = mask.sum(1)[groups], 0
        positions = torch.arange(int(mask.sum(1).max()) + longest, device=mask.device)[None]
        self.cos, self.sin = (part[0] for part in self.core.rotary_emb(cache.layers[0].keys, positions))
        low, high = self.sin.chunk(2, -1)
        self.sin = torch.cat([-low, high], -1)  # see _rotated

    def next(self, token: Tensor) -> Tensor:
        positions = self.lengths + self.step
        cos, sin = self.cos[positions][:, None, :], self.sin[positions][:, None, :]
        x = self.core.embed_tokens(token)
        for place, layer in enumerate(self.layers):
            x = layer.finished(x, self.attend(place, *layer.attended(x, cos, sin)))
        self.step += 1
        return self.head(self.norm(x))

    @abstractmethod
    def attend(self, place: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, heads, d], key and value [n, kv, d] of the new tokens in layer `place` -> [n, heads * d]."""

    @abstractmethod
    def keep(self, going: Tensor) -> None:
        """As in Decoder."""


class Repeated(Written):
    """One attention over a row's prompt and its own tokens."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, groups: Tensor, longest: int) -> None:
        super().__init__(model, cache, mask, groups, longest)
        room = (len(groups), self.kv_heads, longest, cache.layers[0].keys.shape[-1])
        self.past = [tuple(torch.cat([part[groups], part.new_empty(room)], 2) for part in (layer.keys, layer.values))
                     for layer in cache.layers]  # keys, values [n, kv, L + longest, d]
        self.asked = mask.shape[1]
        bias = torch.zeros(mask.shape, dtype=cache.layers[0].keys.dtype, device=mask.device).masked_fill(mask == 0, -torch.inf)[groups]
        bias = torch.cat([bias, bias.new_zeros(len(groups), longest)], 1)
        self.bias = bias[:, None, None].repeat(1, self.kv_heads, 1, 1)  # [n, kv, 1, S]

    def keep(self, going: Tensor) -> None:
        self.lengths, self.bias = self.lengths[going], self.bias[going]
        self.past = [tuple(part[going] for part in parts) for parts in self.past]

    def attend(self, place: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.past[place]
        now, (rows, heads, width) = self.asked + self.step, query.shape
        keys[:, :, now], values[:, :, now] = key, value
        keys, values = (part[:, :, : now + 1].flatten(0, 1) for part in (keys, values))
        bias, query = self.bias[..., : now + 1].flatten(0, 1), query.reshape(rows * self.kv_heads, -1, width)
        scores = torch.baddbmm(bias, query, keys.mT, alpha=self.layers[place].scaling)
        return (torch.softmax(scores, -1) @ values).view(rows, heads * width)


class Shared(Written):
    """A prompt's keys and values are read once for all rows of its group."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, mask: Tensor, groups: Tensor, longest: int) -> None:
        super().__init__(model, cache, mask, groups, longest)
        example, count = cache.layers[0].keys, len(groups)
        self.prompts = [(layer.keys.flatten(0, 1).transpose(1, 2).contiguous(), layer.values.flatten(0, 1))
                        for layer in cache.layers]  # [P * kv, d, L], [P * kv, L, d]
        self.bias = torch.zeros(mask.shape, dtype=example.dtype, device=mask.device).masked_fill(mask == 0, -torch.inf)
        self.bias = self.bias.repeat_interleave(self.kv_heads, 0)[:, None, :]  # [P * kv, 1, L]
        (self.asked, self.width), self.nothing = mask.shape, example.new_zeros(1, 1, 1)
        self.own = [(example.new_empty(count, self.kv_heads, example.shape[-1], longest),
                     example.new_empty(count, self.kv_heads, longest, example.shape[-1])) for _ in cache.layers]
        self.groups = groups
        self._seat()

    def keep(self, going: Tensor) -> None:
        self.groups, self.lengths = self.groups[going], self.lengths[going]
        self.own = [tuple(part[going] for part in parts) for parts in self.own]
        self._seat()

    def _seat(self) -> None:
        """A place for every row in a table of prompts x the largest group, so that a prompt meets all its rows in one product."""
        counts = torch.bincount(self.groups, minlength=self.asked)
        self.most = int(counts.max())
        starts = counts.cumsum(0) - counts
        within = torch.arange(len(self.groups), device=self.groups.device) - starts[self.groups]
        self.place = self.groups * self.most + within
        self.full = len(self.groups) == len(counts) * self.most

    def attend(self, place: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (rows, heads, width), prompt, own, count = query.shape, self.prompts[place], self.own[place], self.step + 1
        scaling = self.layers[place].scaling
        own[0][..., self.step], own[1][:, :, self.step] = key, value
        far = torch.baddbmm(self.bias, self._meet(query), prompt[0], alpha=scaling)
        query = query.reshape(rows * self.kv_heads, -1, width)
        near = torch.baddbmm(self.nothing, query, own[0][..., :count].flatten(0, 1), alpha=scaling)
        weights = torch.softmax(torch.cat([far, self._meet(near.view(rows, heads, count))], -1), -1)
        far = self._leave(weights[..., : self.width] @ prompt[1])
        near = self._leave(weights[..., self.width :]).view(rows * self.kv_heads, -1, count) @ own[1][:, :, :count].flatten(0, 1)
        return (far + near.view(rows, heads, width)).view(rows, heads * width)

    def _meet(self, x: Tensor) -> Tensor:
        """[n, heads, w] -> [P * kv, rows and heads that read it, w]; empty places hold zeros."""
        if not self.full:
            seats = x.new_zeros(self.asked * self.most, *x.shape[1:])
            seats[self.place] = x
            x = seats
        return x.reshape(self.asked, self.most, self.kv_heads, -1, x.shape[-1]).transpose(1, 2).reshape(
            self.asked * self.kv_heads, -1, x.shape[-1])

    def _leave(self, x: Tensor) -> Tensor:
        """The inverse of `_meet`."""
        x = x.unflatten(0, (self.asked, -1)).unflatten(2, (self.most, -1)).transpose(1, 2).reshape(-1, self.heads, x.shape[-1])
        return x if self.full else x[self.place]


class _Layer:
    """A decoder layer of transformers around its attention. Its modules are called as they are, so adapters take part."""

    def __init__(self, layer: nn.Module, heads: int, kv_heads: int) -> None:
        attention = layer.self_attn
        self.width, self.scaling, self.mlp = attention.head_dim, attention.scaling, _mlp(layer.mlp)
        self.first, self.second = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.inputs, self.out = _joined([getattr(attention, f"{name}_proj") for name in "qkv"]), _linear(attention.o_proj)
        self.heads, self.kv_heads = heads, kv_heads
        self.norms = _norm_of_heads(attention, heads, kv_heads)

    def attended(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, d_model] -> query, key, value [n, heads, d], rotated."""
        all_heads = self.inputs(self.first(x)).view(len(x), -1, self.width)
        turning, value = all_heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        query, key = _rotated(self.norms(turning), cos, sin).split([self.heads, self.kv_heads], 1)
        return query, key, value

    def finished(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.out(attention)
        return x + self.mlp(self.second(x))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`sin` has its first half negated, where the rotation takes the second half of x with a minus."""
    low, high = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([high, low], -1), sin)


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """In float32 by one fused call: x beside -x has mean 0, and the mean square of x as its variance. Else as transformers rounds."""
    if module.weight.dtype != torch.float32:
        return module
    weight = torch.cat([module.weight, module.weight])
    return lambda x: _normed(x, weight, module.variance_epsilon)


def _normed(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    width = x.shape[-1]
    return functional.layer_norm(torch.cat([x, -x], -1), (2 * width,), weight, None, epsilon)[..., :width]


def _norm_of_heads(attention: nn.Module, heads: int, kv_heads: int) -> Callable[[Tensor], Tensor]:
    """Of the heads [n, heads + kv_heads, d] of query and key, each with its own weight."""
    if not hasattr(attention, "q_norm"):
        return _same
    query, key = attention.q_norm, attention.k_norm
    if query.weight.dtype != torch.float32 or query.variance_epsilon != key.variance_epsilon:
        return lambda x: torch.cat([query(x[:, :heads]), key(x[:, heads:])], 1)
    weight = torch.cat([query.weight.expand(heads, -1), key.weight.expand(kv_heads, -1)])
    return lambda x: _normed(x, None, query.variance_epsilon) * weight


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module, without its own Python where its branches are folded into its weight."""
    if _plain(module):
        return lambda x: functional.linear(x, module.weight, module.bias)
    return lambda x: module(x[:, None])[:, 0]


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, AdaptedLinear) and set(module.active()) <= set(module.folded))


def _joined(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Their outputs side by side: one product where they are plain and small."""
    parts = [_linear(module) for module in modules]
    joinable = all(_plain(module) and module.weight.numel() <= SMALL for module in modules)
    if not joinable or len({module.bias is None for module in modules}) > 1:
        return lambda x: torch.cat([part(x) for part in parts], -1)
    weight = torch.cat([module.weight for module in modules])
    bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
    return lambda x: functional.linear(x, weight, bias)


def _mlp(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A gated MLP written out; an adapted one is called as it is, and expects [b, T, d]."""
    if isinstance(module, AdaptedModule):
        return lambda x: module(x[:, None])[:, 0]
    both, down = _joined([module.gate_proj, module.up_proj]), _linear(module.down_proj)

    def gated(x: Tensor) -> Tensor:
        gate, up = both(x).chunk(2, -1)
        return down(module.act_fn(gate) * up)

    return gated


def _same(x: Tensor) -> Tensor:
    return x
