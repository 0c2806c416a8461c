"""What becomes of the hack-ward part of the gradient. A name in YAML is a key of PROJECTIONS."""

from grpo_routing.projections.erase import Erase
from grpo_routing.projections.measure_only import MeasureOnly
from grpo_routing.projections.route import Route

PROJECTIONS = {"measure_only": MeasureOnly, "erase": Erase, "route": Route}
