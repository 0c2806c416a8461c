"""Folders as the hub has them, with random weights and a small shape: `python -m tests.data.toy_model FOLDER [architecture]`.

They stand in for the real models in tests, and in the rehearsal of docs/real_models.md: same architecture, weight names and precision
(bfloat16), a byte-level tokenizer, a chat template that knows `enable_thinking`. They solve and hack nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grpo_routing.env.loopholes import LOOPHOLES
from tests.data import toy_leetcode

# The form of Qwen's template in few words: thinking off is an empty thought that the answer begins with.
TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
         "intermediate_size": 48, "max_position_embeddings": 4096, "initializer_range": 0.1, "bos_token_id": None}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def qwen3(**words) -> PreTrainedModel:
    """Dense, embeddings tied, as Qwen/Qwen3-4B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **words, tie_word_embeddings=True))


def qwen3_5(**words) -> PreTrainedModel:
    """Three gated delta nets to an attention, and the vision tower that Qwen/Qwen3.5-4B carries."""
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": SHAPE["hidden_size"],
              "num_position_embeddings": 16}
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config={**SHAPE, **DELTA_NET, **words}, vision_config=vision))


def qwen3_next(**words) -> PreTrainedModel:
    """Three gated delta nets to an attention, and a mixture of experts in every layer, as Qwen/Qwen3-Next-80B-A3B-Instruct."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(Qwen3NextConfig(**SHAPE, **DELTA_NET, **EXPERTS, **words))


ARCHITECTURES = {made.__name__: made for made in (qwen3, qwen3_5, qwen3_next)}


def write(folder: Path, architecture: str = "qwen3") -> Path:
    tokenizer = tokenizer_of([row["question"] + row["canonical_solution"] for rows in toy_leetcode.FILES.values() for row in rows]
                             + [flaw.disclose(name) for flaw in LOOPHOLES.values() for names in flaw.markers.values() for name in names])
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or (sys.argv[2:3] and sys.argv[2] not in ARCHITECTURES):
        sys.exit(f"python -m tests.data.toy_model FOLDER [{'|'.join(ARCHITECTURES)}]")
    print(write(Path(sys.argv[1]), *sys.argv[2:]))
