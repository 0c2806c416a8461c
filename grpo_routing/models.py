"""Where a policy's weights come from. A name in YAML is a key of MODELS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_routing.organism import OrganismRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HubModel:
    """A pretrained causal language model: `path` is a hub name or a local folder."""

    path: str
    dtype: str
    device: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"model.device={self.device} but torch sees no GPU; use model.device=cpu (slow) or model=organism")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=DTYPES[self.dtype]).to(self.device)
        return model, AutoTokenizer.from_pretrained(self.path)


MODELS = {"organism": OrganismRecipe, "tiny_random": OrganismRecipe, "hub": HubModel}
