"""How a problem is put to the policy. A name in YAML is a key of PROMPTS."""

from grpo_routing.prompts.plain import plain_prompt

PROMPTS = {"plain": plain_prompt}
