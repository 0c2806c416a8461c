"""How the rewards of a group become advantages. A name in YAML is a key of ADVANTAGES."""

from grpo_routing.advantages.balanced import Balanced
from grpo_routing.advantages.dr_grpo import DrGrpo
from grpo_routing.advantages.grpo import Grpo
from grpo_routing.advantages.mo_grpo import MoGrpo
from grpo_routing.advantages.modification import Modification
from grpo_routing.advantages.penalty import Penalty
from grpo_routing.advantages.screening import Screening
from grpo_routing.advantages.weighted import Weighted

ADVANTAGES = {"dr_grpo": DrGrpo, "grpo": Grpo, "balanced": Balanced, "weighted": Weighted, "penalty": Penalty, "screening": Screening,
              "modification": Modification, "mo_grpo": MoGrpo}
