"""Which rollouts, or which part of the gradient, are hack-ward. One small file per source; a name in YAML is a key of MASK_SOURCES."""

from grpo_routing.mask_sources.controls import NonHack, RandomBasis, Shuffled
from grpo_routing.mask_sources.detector import Detector, RateMatched
from grpo_routing.mask_sources.lookalike import Lookalike, LookalikeRateMatched
from grpo_routing.mask_sources.none import NoSource
from grpo_routing.mask_sources.persona_gradient import PersonaGradient

MASK_SOURCES = {
    "none": NoSource,
    "persona_gradient": PersonaGradient,
    "random": RandomBasis,
    "shuffled": Shuffled,
    "nonhack": NonHack,
    "detector": Detector,
    "rate_matched": RateMatched,
    "lookalike": Lookalike,
    "rate_matched_lookalike": LookalikeRateMatched,
}
