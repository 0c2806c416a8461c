"""How the rewards of a group become advantages. A name in YAML is a key of ADVANTAGES."""

from grpo_routing.advantages.dr_grpo import DrGrpo
from grpo_routing.advantages.grpo import Grpo

ADVANTAGES = {"dr_grpo": DrGrpo, "grpo": Grpo}
