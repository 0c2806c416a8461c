"""What is done to the policy while rollouts are sampled, and at no other time. A name in YAML is a key of SAMPLINGS."""

from grpo_routing.sampling.plain import Plain
from grpo_routing.sampling.suppressed import Suppressed

SAMPLINGS = {"plain": Plain, "suppressed": Suppressed}
