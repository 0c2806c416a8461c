"""Rollouts beside the policy's own. A name in YAML is a key of EXTRA_ROLLOUTS.

    called    rollouts inside the step's groups         edit    rewards and labels under the rule of its own groups
    groups    further groups per step                   aside   a gradient beside the task's, which touches neither
"""

from grpo_routing.extra_rollouts.anchor import Anchor
from grpo_routing.extra_rollouts.confession import Confession
from grpo_routing.extra_rollouts.none import NoExtra
from grpo_routing.extra_rollouts.teacher import Teacher

EXTRA_ROLLOUTS = {"none": NoExtra, "teacher": Teacher, "anchor": Anchor, "confession": Confession}
