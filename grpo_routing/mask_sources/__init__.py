"""Which rollouts, or which part of the gradient, are hack-ward. One small file per source; a name in YAML is a key of MASK_SOURCES."""

from grpo_routing.mask_sources.ceiling import Ceiling
from grpo_routing.mask_sources.composition import And, Budget, Delay, Not, Or
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.mask_sources.fingerprint import Fingerprint
from grpo_routing.mask_sources.logp_gap import LogpGap
from grpo_routing.mask_sources.lookalike import Lookalike
from grpo_routing.mask_sources.none import NoSource
from grpo_routing.mask_sources.persona_activation import PersonaActivation
from grpo_routing.mask_sources.persona_gradient import PersonaGradient
from grpo_routing.mask_sources.quarantine_activity import QuarantineActivity
from grpo_routing.mask_sources.reward_quantile import RewardQuantile
from grpo_routing.mask_sources.self_report import SelfReport
from grpo_routing.mask_sources.text_monitor import TextMonitor
from grpo_routing.mask_sources.trusted_subspace import TrustedSubspace

MASK_SOURCES = {
    "none": NoSource,
    "persona_gradient": PersonaGradient,
    "persona_activation": PersonaActivation,
    "fingerprint": Fingerprint,
    "detector": Detector,
    "lookalike": Lookalike,
    "self_report": SelfReport,
    "quarantine_activity": QuarantineActivity,
    "logp_gap": LogpGap,
    "reward_quantile": RewardQuantile,
    "text_monitor": TextMonitor,
    "trusted_subspace": TrustedSubspace,
    "ceiling": Ceiling,
    "and": And,
    "or": Or,
    "not": Not,
    "delay": Delay,
    "budget": Budget,
}
