"""What becomes of the hack-ward part of the gradient. A name in YAML is a key of PROJECTIONS."""

from grpo_routing.projections.erase import Erase
from grpo_routing.projections.measure_only import MeasureOnly
from grpo_routing.projections.restrict import Restrict
from grpo_routing.projections.route import Route
from grpo_routing.projections.route_subspace import RouteSubspace
from grpo_routing.projections.stop_gradient import StopGradient

PROJECTIONS = {"measure_only": MeasureOnly, "erase": Erase, "route": Route, "route_subspace": RouteSubspace, "restrict": Restrict,
               "stop_gradient": StopGradient}
