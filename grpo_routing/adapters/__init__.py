"""Where the trainable parameters live: a deployed block and, when it has a size, a quarantine block."""

from grpo_routing.adapters.adapter import AdaptedLinear, AdaptedModule, Adapter
from grpo_routing.adapters.lora import Lora
from grpo_routing.adapters.mlp import Mlp
from grpo_routing.adapters.svd import Svd

ADAPTERS = {"lora": Lora, "svd": Svd, "mlp": Mlp}

__all__ = ["ADAPTERS", "AdaptedLinear", "AdaptedModule", "Adapter", "Lora", "Mlp", "Svd"]
