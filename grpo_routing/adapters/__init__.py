"""Where the trainable parameters live: a deployed block and, for some adapters, a quarantine block."""

from grpo_routing.adapters.adapter import AdaptedLinear, Adapter
from grpo_routing.adapters.lora import Lora
from grpo_routing.adapters.svd import Svd

ADAPTERS = {"lora": Lora, "svd": Svd}

__all__ = ["ADAPTERS", "AdaptedLinear", "Adapter", "Lora", "Svd"]
