"""Rollouts beside the policy's own. A name in YAML is a key of EXTRA_ROLLOUTS."""

from grpo_routing.extra_rollouts.anchor import Anchor
from grpo_routing.extra_rollouts.none import NoExtra
from grpo_routing.extra_rollouts.teacher import Teacher

EXTRA_ROLLOUTS = {"none": NoExtra, "teacher": Teacher, "anchor": Anchor}
