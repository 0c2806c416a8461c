"""Where a policy's weights come from. A name in YAML is a key of MODELS."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grpo_routing.organism import OrganismRecipe
from grpo_routing.preparation import Preparation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HubModel:
    """A pretrained causal language model: `path` is a hub name or a local folder."""

    path: str
    dtype: str
    device: str
    prepare: Preparation
    cache: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"model.device={self.device} but torch sees no GPU; use model.device=cpu (slow) or model=organism")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.read(self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the model reads text with, without its weights."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    @property
    def origin(self) -> str:
        """What a prepared model is a preparation of."""
        return f"hub-{Path(self.path).name}-{hashlib.sha256(f'{self.path} {self.dtype}'.encode()).hexdigest()[:8]}"

    def read(self, folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[self.dtype]).to(self.device)
        return model, AutoTokenizer.from_pretrained(folder)


MODELS = {"organism": OrganismRecipe, "tiny_random": OrganismRecipe, "hub": HubModel}
