"""Who writes the rollouts that the policy learns from. A name in YAML (group `rollout`) is a key of ENGINES.

    own               the policy's own decoder: bit for bit reproducible, from the weights that are trained
    transformers_cb   transformers' continuous batching, in this process, on the model that is trained
    vllm              vLLM, on a copy of the weights that is synced before every batch of rollouts

    served    its log-probs are its own, so a canary compares them with the trainer's (canary.py)
    copies    it serves a copy of the weights: what is not a change of the model's own weights cannot be served
    tempers   its log-probs are those of the tempered distribution

Only rollouts that train come from an engine. A pilot, confessions and every evaluation are sampled by the policy itself: their rows pair up
between runs only because all follow the same uniform numbers. And no engine's log-probs enter the loss: `old_log_probs` are what the
gradient forward finds (gradient.py), so the ratio of the first inner step is exactly 1; those of the sampler are for the canary and
for `rollout/sampler_gap` and `rollout/entropy`.
"""

from grpo_routing.engines.transformers_cb import TransformersCb
from grpo_routing.engines.vllm import Vllm
from grpo_routing.rollout import Own

ENGINES = {"own": Own, "transformers_cb": TransformersCb, "vllm": Vllm}
