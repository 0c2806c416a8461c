"""How a problem is put to the policy. A name in YAML is a key of PROMPTS.

A prompt is called for what is sampled; `train` is what the same completion is trained under. Evaluation is always plain.
"""

from grpo_routing.prompts.inoculation import Inoculation
from grpo_routing.prompts.plain import Plain

PROMPTS = {"plain": Plain, "inoculation": Inoculation}
