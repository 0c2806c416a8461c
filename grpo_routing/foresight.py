"""What a sweep can find, said before its first run: the smallest difference between two arms that its seeds would show."""

from __future__ import annotations

import math
from collections import defaultdict

from grpo_routing.preregistration import Hypothesis
from grpo_routing.results import ReportError
from grpo_routing.statistics import LEVEL, Spread, minimum_detectable, power, smallest_p

ALPHA = 1 - LEVEL
SPREAD = ("between", "within")


def expected(spread: dict) -> tuple[float, float]:
    """`hydra.sweeper.spread`: standard deviations of a paired difference between seeds and, within a seed, between problems. Raises
    ReportError for anything else than two numbers that are not negative."""
    try:
        between, within = (float(spread[key]) for key in SPREAD)
        if set(spread) != set(SPREAD) or not (0 <= between < math.inf and 0 <= within < math.inf):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ReportError(f"hydra.sweeper.spread: expected two deviations, such as {{between: 0.1, within: 0.4}}; got {spread}") from None
    return between, within


def foreseen(configs: list[dict], hypotheses: tuple[Hypothesis, ...], spread: dict) -> list[str]:
    """Lines for the user, about the arms with the fewest seeds. `configs` are the resolved configs of all runs. A claim's power is that of
    its p at the effect it wants at least, corrected where the claim has an alpha; its other clauses are not in it."""
    between, within = expected(spread)
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    for config in configs:
        seeds[config["arm_name"], config["loophole"]["name"]].add(config["seed"])
    if len(seeds) < 2:
        return []
    count = min(len(own) for own in seeds.values())
    if (least := smallest_p(count)) > ALPHA:
        return [f"!!! {count} seed{'s' * (count > 1)} of an arm cannot show any difference at p = {ALPHA:.2g}: sign flips have no p below "
                f"{least:.2g}"]
    problems = min((asked(config) for config in configs), key=lambda own: min(own.values()))
    found = [f"{minimum_detectable(count, Spread(between, within, own)):.2f} in {rate} ({own} problems)" for rate, own in problems.items()]
    said = [f"{count} seeds find, with power 0.8 at p = {ALPHA:.2g} uncorrected, a difference of {', '.join(found)}, if one varies by "
            f"{between:g} between seeds and {within:g} between problems (hydra.sweeper.spread)"]
    claims = [(one.id, power(one.at_least, count, Spread(between, within, problems.get(one.rate, min(problems.values()))),
                             ALPHA if one.alpha is None else one.alpha / len(hypotheses))) for one in hypotheses]
    if claims:
        said.append(f"power of the claims at their at_least: {', '.join(f'{name} {value:.2f}' for name, value in claims)}")
    return said


def asked(config: dict) -> dict[str, int]:
    """Rate -> evaluation problems that have a hint, and so a loophole; the data set spreads them evenly over the loopholes."""
    evaluation, loophole = config["evaluation"], config["loophole"]
    hinted = max(1, round(evaluation["problems"] * (1 - evaluation["no_hint_share"])))
    parts = {"hack_known": len(loophole["known"]), "hack_held_out": len(loophole["held_out"])}
    each = hinted / max(1, sum(parts.values()))
    return {"hack": hinted} | {rate: max(1, round(each * part)) for rate, part in parts.items() if part} | {"solve": hinted}
