"""A causal language model with an adapter: what it samples and how likely it finds tokens.

The reference policy of the KL is the same model with all blocks off; there is no second model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import Adapter
from grpo_routing.decoder import DENSE, Decoder, decoder
from grpo_routing.head import chosen_log_probs
from grpo_routing.parallel import ALONE, World
from grpo_routing.types import Packed, TokenBatch

if TYPE_CHECKING:  # loading it takes longer than planning a hundred runs
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Sampled = tuple[tuple[int, ...], tuple[float, ...]]  # completion ids, their log-probs under the policy at temperature 1
Left = Callable[[list[int], list[tuple[int, ...]]], None]  # hears which rows have left a batch that goes on, and their completions


class Policy:
    """`world` are the processes that work with copies of this policy."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Adapter, world: World = ALONE) -> None:
        self.model, self.tokenizer, self.adapter, self.world = model.eval(), tokenizer, adapter, world
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        # Pairs are read again at every refit and prompts in every epoch; tokenizing them anew costs as much as a layer.
        self.encode = lru_cache(maxsize=1 << 16)(self._tokenize)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the frozen weights; adapters have their own."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if ".blocks." not in name:
                digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_all(self, texts: list[str]) -> list[tuple[int, ...]]:
        return [self.encode(text) for text in texts]

    def encode_prompts(self, prompts: list[str]) -> list[tuple[int, ...]]:
        """Prompts as the model was taught to read them: through its chat template where it has one, thinking off."""
        return self.encode_all(chat(self.tokenizer, prompts))

    def batch(self, texts: list[tuple[str, str]]) -> TokenBatch:
        """(prompt, completion) texts as tokens; every completion ends."""
        prompts = self.encode_prompts([prompt for prompt, _ in texts])
        sequences = [(prompt, (*self.encode(completion), self.end)) for prompt, (_, completion) in zip(prompts, texts)]
        return TokenBatch.of(sequences, self.pad, self.device)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def log_probs(self, tokens: TokenBatch, packed: Packed | None = None) -> Tensor:
        """Log-probability of each next token, [b, T-1]; zero outside the completion. `packed` holds the same completions in the same order
        with fewer prompts to compute."""
        mask = tokens.completion_mask
        if packed is not None:
            return self._chosen(*self._packed(packed), mask)
        hidden = self._hidden(input_ids=tokens.ids)[:, :-1]
        return self._chosen(hidden[mask], tokens.ids[:, 1:][mask], mask)

    def packed_log_probs(self, packed: Packed) -> Tensor:
        """Log-probability of each completion token given its prompt and its own completion so far, [b, T]; else zero."""
        return self._chosen(*self._packed(packed), packed.segment > 0)

    def _packed(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Hidden states [n, d] before every completion token, and the tokens [n], row by row."""
        hidden = self._hidden(input_ids=packed.ids, position_ids=packed.positions, attention_mask=packed.attention(self.model.dtype))
        before, mask = hidden.gather(1, packed.previous[..., None].expand_as(hidden)), packed.segment > 0
        return before[mask], packed.ids[mask]

    @cached_property
    def packs(self) -> bool:
        """Whether completions can share a row."""
        return packable(self.model)

    def _hidden(self, **inputs: Tensor) -> Tensor:
        return self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state

    def _chosen(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Log-probs of `targets` [n] from hidden states [n, d], put where `mask` is True. Only completion positions come here."""
        picked = chosen_log_probs(self.model.get_output_embeddings(), hidden, targets)
        return picked.new_zeros(mask.shape).masked_scatter(mask, picked)

    def pooled_hidden(self, tokens: TokenBatch, layers: Sequence[int]) -> Tensor:
        """`hidden_at` of the frozen model (all blocks off), mean over the completion, side by side: [b, layers * d]."""
        with self.adapter.only():
            return torch.cat(self.hidden_at(tokens, layers, "mean"), 1)

    @torch.no_grad()
    def hidden_at(self, tokens: TokenBatch, layers: Sequence[int], position: str) -> list[Tensor]:
        """Hidden states of the policy as it stands at these layers, pooled over the completion (`pool`), [b, d] each.

        Layer 0 is the embedding. Raises ValueError for a layer that the model lacks.
        """
        if strange := [layer for layer in layers if not -self.depth - 1 <= layer <= self.depth]:
            raise ValueError(f"the model has hidden states 0 to {self.depth}; got layers {strange}")

        def read(part: TokenBatch) -> dict[int, Tensor]:
            states = self.hidden_states(part)
            return {place: pool(states[layer], part, position) for place, layer in enumerate(layers)}

        return list(self._apart(tokens, read).values())

    @torch.no_grad()
    def hidden_states(self, tokens: TokenBatch) -> tuple[Tensor, ...]:
        """The embedding and the output of every layer, [b, T, d] each."""
        return self.model.get_decoder()(input_ids=tokens.ids, use_cache=False, output_hidden_states=True).hidden_states

    @property
    def depth(self) -> int:
        """How many decoder layers there are."""
        return len(self.model.get_decoder().layers)

    @contextmanager
    def edited(self, edits: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Within, every forward goes on from edits[l](h) in place of h, the output of decoder layer l (counted from 1)."""
        layers = self.model.get_decoder().layers
        handles = [layers[layer - 1].register_forward_hook(lambda module, inputs, h, edit=edit: edit(h)) for layer, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def pooled_coordinates(self, tokens: TokenBatch, position: str) -> dict[str, Tensor]:
        """What each adapted module reads, in the deployed block's own coordinates, pooled over the completion: name -> [b, r]."""
        return self._apart(tokens, lambda part: self._read(part, lambda module, x: pool(module.coordinates(x), part, position)))

    @torch.no_grad()
    def branch_norms(self, tokens: TokenBatch, block: str) -> dict[str, Tensor]:
        """Length of what a block adds at scale 1, mean over the completion: name -> [b]."""
        def norm(module, x: Tensor, part: TokenBatch) -> Tensor:
            return pool(module.branch(x, block).norm(dim=-1, keepdim=True), part, "mean").squeeze(1)

        return self._apart(tokens, lambda part: self._read(part, lambda module, x: norm(module, x, part)))

    def _apart(self, tokens: TokenBatch, read: Callable[[TokenBatch], dict]) -> dict:
        """What `read` gives of every row, name -> [b, ...], each process reading its share of the rows."""
        if self.world.size == 1:
            return read(tokens)
        own = self.world.share(range(len(tokens)))
        parts = self.world.joined("activations", [{name: value.cpu() for name, value in read(tokens.rows(own)).items()}] if own else [])
        return {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}

    def _read(self, tokens: TokenBatch, reading: Callable) -> dict[str, Tensor]:
        """reading(module, its input) of every adapted module, from one forward."""
        found: dict[str, Tensor] = {}

        def hook(name: str) -> Callable:
            return lambda module, inputs: found.__setitem__(name, reading(module, inputs[0]))

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in self.adapter.modules.items()]
        try:
            self._hidden(input_ids=tokens.ids)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @torch.no_grad()
    def reference_log_probs(self, tokens: TokenBatch, packed: Packed | None = None) -> Tensor:
        with self.adapter.only():
            return self.log_probs(tokens, packed)

    @torch.inference_mode()
    def sample(self, prompts: list[tuple[int, ...]], counts: list[int], uniforms: Tensor, temperature: float,
               left: Left | None = None) -> list[Sampled]:
        """counts[p] completions of prompt p, prompt by prompt.

        uniforms [sum(counts), max_new_tokens] in [0, 1) decide every token by inverse transform, so a rollout
        depends on its own seed only. Each prompt is prefilled once for its group (decoder.py). Finished rows leave the batch when they
        are a quarter of it: to close the ranks at each of them costs more than to carry them along. `left` hears of those.
        """
        with self.adapter.merged():
            logits, rows = self._prefill(prompts, counts, uniforms.shape[1])
            count, max_new = uniforms.shape
            ids = torch.full((count, max_new), self.pad, device=self.device)
            log_probs = torch.zeros((count, max_new), device=self.device)
            live, going = torch.arange(count, device=self.device), torch.ones(count, dtype=torch.bool, device=self.device)
            for step in range(max_new):
                unit = torch.log_softmax(logits.float(), -1)
                distribution = unit.exp() if temperature == 1.0 else torch.softmax(unit / temperature, -1)
                token = inverse_transform(distribution, uniforms[live, step])
                ids[live, step], log_probs[live, step] = token, unit.gather(1, token[:, None]).squeeze(1)
                going &= token != self.end
                still = int(going.sum())
                if still == 0 or step + 1 == max_new:
                    break
                if still <= 0.75 * len(live):
                    if left:
                        gone = live[~going]
                        left(gone.tolist(), [upto(own, self.end) for own in ids[gone, : step + 1].tolist()])
                    chosen = going.nonzero().squeeze(1)
                    live, token, going = live[chosen], token[chosen], going[chosen]
                    rows.keep(chosen)
                logits = rows.next(token)
        completions = [upto(own, self.end) for own in ids.tolist()]
        return [(own, tuple(said[: len(own)])) for own, said in zip(completions, log_probs.tolist())]

    def _prefill(self, prompts: list[tuple[int, ...]], counts: list[int], longest: int) -> tuple[Tensor, Decoder]:
        """Logits [sum(counts), V] after every row's prompt, and what continues the rows."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        groups = torch.arange(len(prompts), device=self.device).repeat_interleave(torch.tensor(counts, device=self.device))
        return output.logits[groups, -1], decoder(self.model, output.past_key_values, mask, groups, longest)


def upto(ids: list[int], end: int) -> tuple[int, ...]:
    """The ids up to the first `end`, it included; what a finished row said afterwards does not count."""
    return tuple(ids[: ids.index(end) + 1] if end in ids else ids)


def packable(model: PreTrainedModel) -> bool:
    """Whether completions can share a row behind a mask of ours: every layer attends to all positions (a recurrent one would read one
    into the other), by an implementation that takes such a mask (flash attention does not)."""
    kinds = getattr(model.config, "layer_types", None) or (["full_attention"] if model.config.model_type in DENSE else ["unknown"])
    return set(kinds) == {"full_attention"} and model.config._attn_implementation in ("sdpa", "eager")


def chat(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Prompts through the chat template, thinking off; as they are where the tokenizer has none."""
    if not tokenizer.chat_template:
        return prompts
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def pool(states: Tensor, tokens: TokenBatch, position: str) -> Tensor:
    """[b, T, d] -> [b, d]: the mean over the completion's tokens, its last token, or the prompt's (`position` mean, last, prompt_last)."""
    mask = tokens.completion_mask
    if position == "prompt_last":
        return states[torch.arange(len(states), device=states.device), mask.int().argmax(1)]
    if position == "last":
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        return states[torch.arange(len(states), device=states.device), last + 1]
    share = mask[..., None].to(states)
    return (states[:, 1:] * share).sum(1) / share.sum(1)


def inverse_transform(distribution: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row: the first whose cumulative probability exceeds the row's uniform number. [n, V], [n] -> [n].

    Rounding must not carry a uniform near 1 past the last token of positive probability. Raises FloatingPointError when a
    probability is not finite.
    """
    total = distribution.double().cumsum(-1)
    top = total[:, -1:]
    if not bool(torch.isfinite(top).all()):
        raise FloatingPointError("the policy gives probabilities that are not finite; its parameters or activations have diverged. "
                                 "Lower optimizer.lr")
    scaled = torch.minimum(uniforms.double()[:, None] * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(total, scaled, right=True).squeeze(1)
