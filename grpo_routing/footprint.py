"""What a run of a plan will hold and compute, from shapes alone: no weights are read or made.

The model is built of fake tensors (shapes and types without values), the real adapter is attached to it, and the real forward, head and
per-rollout backward of one micro-batch run on it while live bytes and multiplications are counted. Layers repeat, so a deep model is
counted at a few layers and at twice as many and continued along the line, which is exact for everything that each layer adds alike.
Rollouts of a prompt are packed into a row where nothing tells them apart (gradient.alike); where a mask may, none are taken to be, which
is the larger of the two. There transformers, on fake tensors, repeats keys and values for grouped heads, which it does not do on real
ones: activations come out up to a tenth too large.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.adapters.per_rollout import flat_gradient
from grpo_routing.build import ConfigError, Plan
from grpo_routing.decoder import DENSE, SMALL
from grpo_routing.head import chosen_log_probs, chunk_rows
from grpo_routing.memory import LiveBytes
from grpo_routing.models import DTYPES, FLASH, HubModel
from grpo_routing.organism import build_model, tokenizer_texts, train_tokenizer
from grpo_routing.policy import packable
from grpo_routing.types import Packed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FEW = 2  # layers at which a deep model is counted at least, and at twice as many


@dataclass(frozen=True)
class Sizes:
    """Tokens that a run is estimated for: of a prompt, and of a completion that runs to its end."""

    prompt: int
    completion: int


@dataclass(frozen=True)
class Footprint:
    """Bytes and multiply-adds times two; all grow along a line with the number of layers."""

    parameters: float  # bytes of the frozen weights
    folded: float  # bytes of the weights that sampling replaces by a copy with the adapter folded in
    joined: float  # bytes of those that the decoder copies side by side
    adapter_numbers: float  # trainable numbers, all blocks
    adapter: float  # their bytes
    cache_per_token: float  # bytes of keys and values
    saved: float  # bytes that wait for the backward of one micro-batch, once its forward is done
    update_peak: float  # bytes at the height of one micro-batch, `saved` included
    prefill_peak: float  # bytes at the height of the prompts' forward, their cache included
    decoded: float  # bytes of weights read for every token
    update_operations: float  # of one micro-batch, forward and backward
    prefill_operations: float  # of one forward of prompts
    decode_operations: float  # of one token of one row
    vocabulary: float
    itemsize: float  # bytes of a number of the model


def footprint(plan: Plan, sizes: Sizes) -> Footprint:
    """Raises ConfigError when the model's shape cannot be had."""
    make, layers, period = shape_of(plan.model)
    few = period * math.ceil(FEW / period)
    if layers <= 2 * few or layers % period:
        return counted(plan, sizes, make(layers))
    one, two = (counted(plan, sizes, make(count)) for count in (few, 2 * few))
    return Footprint(**{f.name: getattr(one, f.name) + (getattr(two, f.name) - getattr(one, f.name)) * (layers - few) / few
                        for f in fields(Footprint)})


def shape_of(source: Any) -> tuple[Callable[[int], Callable[[], PreTrainedModel]], int, int]:
    """make(layers) -> what builds the model with so many layers; how many it has; after how many their kinds repeat."""
    from transformers import AutoModelForCausalLM

    if not isinstance(source, HubModel):
        tokenizer = train_tokenizer(tokenizer_texts(source), source.vocabulary)
        return lambda layers: lambda: build_model(replace(source, layers=layers), tokenizer), source.layers, 1
    config = config_of(source)

    def make(layers: int) -> Callable[[], PreTrainedModel]:
        short = copy.deepcopy(config)
        short.num_hidden_layers = layers
        if getattr(short, "layer_types", None):
            short.layer_types = short.layer_types[:layers]
        return lambda: AutoModelForCausalLM.from_config(short, dtype=DTYPES[source.precision])

    kinds = getattr(config, "layer_types", None) or ["alike"]
    return make, config.num_hidden_layers, next(n for n in range(1, len(kinds) + 1) if kinds == (kinds[:n] * len(kinds))[: len(kinds)])


def config_of(source: HubModel) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.place).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the shape of model.path={source.path} cannot be read: it is no local folder with a config.json, it is not in "
                          f"the Hugging Face cache, and the hub did not answer. Give model.path=FOLDER that holds the model's "
                          f"config.json; nothing else of it is read ({str(error).splitlines()[0]})") from error


def counted(plan: Plan, sizes: Sizes, build: Callable[[], PreTrainedModel]) -> Footprint:
    with FakeTensorMode():
        model = build().eval()
        parameters = nbytes(model.parameters())
        adapter = plan.adapter.attach(model)
        blocks = [p for block in adapter.blocks for own in adapter.parameters(block).values() for p in own.values()]
        own = {id(p) for p in blocks}
        core, head = model.get_decoder(), model.get_output_embeddings()
        embedded = model.get_input_embeddings().weight
        looked_up = 0 if embedded is head.weight else embedded.nbytes  # a table from which a token reads one row
        saved, peak, operations = update(plan, sizes, model, adapter)
        prefill, cache, prefill_operations = prompts(plan, sizes, core)
        dense = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in own and (p is not embedded or not looked_up))
        return Footprint(
            parameters=parameters, folded=nbytes(adapted_weights(adapter)), joined=nbytes(joined_weights(model)),
            adapter_numbers=sum(p.numel() for p in blocks), adapter=nbytes(blocks), cache_per_token=cache, saved=saved,
            update_peak=peak, prefill_peak=prefill,
            decoded=parameters - looked_up, update_operations=operations, prefill_operations=prefill_operations,
            decode_operations=2.0 * dense, vocabulary=len(head.weight), itemsize=head.weight.element_size())


def update(plan: Plan, sizes: Sizes, model: PreTrainedModel, adapter: Adapter) -> tuple[int, int, float]:
    """Bytes saved for the backward, bytes at the height, and operations of one micro-batch; as gradient.rollout_gradients runs it."""
    micro, blocks = min(plan.trainer.micro_batch, rollouts(plan)), plan.projection.blocks
    together = min(micro, plan.trainer.group) if packs(plan, model) else 1
    rows, width = micro // together, sizes.prompt + together * sizes.completion
    table, places = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows * together * sizes.completion, dtype=torch.long)
    core, head = model.get_decoder(), model.get_output_embeddings()

    def log_probs() -> torch.Tensor:
        if together == 1:
            hidden = core(input_ids=table, use_cache=False).last_hidden_state
        else:
            packed = Packed(table, table, table, table)  # ids, positions, segment, previous
            hidden = core(input_ids=table, position_ids=table, attention_mask=packed.attention(model.dtype), use_cache=False)
            hidden = hidden.last_hidden_state
            hidden = hidden.gather(1, table[..., None].expand_as(hidden))
        return chosen_log_probs(head, hidden.flatten(0, 1)[places], places)

    def backward(value: torch.Tensor) -> None:
        if plan.trainer.kl_weight:
            with torch.no_grad(), adapter.only():
                log_probs()
        value.sum().backward()
        for own in leaves.values():
            for module in own.values():
                flat_gradient(module)

    with LiveBytes() as seen, adapter.per_rollout(rows, blocks) as leaves:
        value = log_probs()
        saved = seen.live
        backward(value)
    with FlopCounterMode(display=False) as counter, adapter.per_rollout(rows, blocks) as leaves:  # apart: it keeps what it counts alive
        backward(log_probs())
    half = 0.5 if together == 1 else 1.0  # a causal kernel skips the half that nobody sees; behind a mask of ours it does not
    return saved, seen.peak, counter.get_total_flops() + half * attention_operations(model.config, rows, width)


def attention_operations(config: PretrainedConfig, rows: int, width: int) -> float:
    """Of scores and their products with values, which the counter does not know on a CPU; the backward computes the scores again, so that
    it is two and a half forwards. Layers of other kinds than full attention are matrix products, and counted."""
    full = (getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers).count("full_attention")
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 3.5 * 4.0 * full * rows * width**2 * config.num_attention_heads * wide


def keeps(plan: Plan) -> bool:
    """Whether every rollout's gradient is kept, because the decision about it comes after the backward (decision.differentiate)."""
    return "gradients" in plan.mask_source.reads or plan.advantage.two_streams


def packs(plan: Plan, model: PreTrainedModel) -> bool:
    """Whether the rollouts of a prompt surely share a row: only sums are asked for, nobody labels them or measures them one by one, and
    the model can."""
    flash = getattr(plan.model, "attn_implementation", None) == FLASH
    return plan.mask_source.kind == "none" and not keeps(plan) and not flash and packable(model)


@torch.no_grad()
def prompts(plan: Plan, sizes: Sizes, core: nn.Module) -> tuple[int, float, float]:
    """Bytes at the height of one forward of prompts, bytes of their cache per token, and its operations."""
    count = min(plan.trainer.prompts_per_forward, plan.trainer.prompts_per_step)
    ids = torch.zeros(count, sizes.prompt, dtype=torch.long)
    with LiveBytes() as seen:
        output = core(input_ids=ids, use_cache=True)
    with FlopCounterMode(display=False) as counter:
        core(input_ids=ids, use_cache=False)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers if hasattr(layer, "keys"))
    return seen.peak, held / (count * sizes.prompt), float(counter.get_total_flops())


def adapted_weights(adapter: Adapter) -> list[torch.Tensor]:
    """What folding replaces by a copy: the weights of the adapted linears, or those of adapted MLPs."""
    found = []
    for module in adapter.modules.values():
        frozen = getattr(module, "frozen", None)
        found += [part.weight for part in frozen.children() if isinstance(part, nn.Linear)] if frozen else [module.weight]
    return found


def joined_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of the products that the written-out decoder joins (decoder._joined): projections of the input, and of an MLP."""
    if model.config.model_type not in DENSE:
        return []
    sets = [[getattr(part, name) for name in names] for layer in model.get_decoder().layers
            for part, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj")))
            if hasattr(part, names[0])]
    return [one.weight for parts in sets if all(one.weight.numel() <= SMALL for one in parts) for one in parts]


def rollouts(plan: Plan) -> int:
    """Of a step, those of anchor groups included."""
    return (plan.trainer.prompts_per_step + plan.extra_rollouts.groups) * plan.trainer.group


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def chunk_bytes(vocabulary: float, positions: int) -> float:
    """Of the two tables of logits that are alive together in the head."""
    return 2 * 4 * vocabulary * min(positions, chunk_rows(int(vocabulary), 4))
