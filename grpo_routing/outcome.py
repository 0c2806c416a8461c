"""Whether a hypothesis is confirmed, falsified or undecided: by its frozen text and RULES of preregistration.py alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from grpo_routing.arms import Arm
from grpo_routing.comparison import CONTROL, Comparison, Experiment, Refused, seeds_of
from grpo_routing.preregistration import RULES, Hypothesis, Preregistration
from grpo_routing.results import BASE, ReportError
from grpo_routing.statistics import LEVEL, Interval, holm, interval, sem, sign_flip

CONFIRMED, FALSIFIED, UNDECIDED = WORDS = ("confirmed", "falsified", "undecided")


@dataclass(frozen=True)
class Evidence:
    """What the rules look at. Effects are in the hypothesis's direction, errors of the mean over seeds."""

    effect: Interval
    error: float
    solve: Interval  # arm minus versus
    beaten: dict[str, tuple[Interval, float]]  # control word -> effect against it, its error
    p: float  # corrected
    faults: tuple[str, ...]  # why nothing may be decided


@dataclass(frozen=True)
class Outcome:
    hypothesis: Hypothesis
    word: str
    reasons: tuple[str, ...]  # of a falsified one what fired, of an undecided one what is missing


def decide(claim: Hypothesis, seen: Evidence) -> Outcome:
    """The rules, clause by clause."""
    effect, margin = seen.effect, 0.0 if claim.within_sem is None else claim.within_sem
    fired = {
        f"effect {effect.mean:.2f} < {claim.falsified_below:g}": effect.mean < claim.falsified_below,
        f"solve drops by {-seen.solve.mean:.2f}": claim.max_solve_drop is not None and -seen.solve.mean > claim.max_solve_drop,
        f"effect {effect.mean:.2f} within {margin:g} SEM ({seen.error:.3f})":
            claim.within_sem is not None and abs(effect.mean) <= margin * seen.error,
    } | {f"does not beat {word}: {own.mean:.2f} ± {error:.2f} SEM": own.mean <= max(0.0, margin * error)
         for word, (own, error) in seen.beaten.items()}
    missing = {
        f"effect {effect.mean:.2f} < {claim.at_least:g}": effect.mean < claim.at_least,
        f"solve differs by {seen.solve.mean:+.2f}":
            claim.matched_solve_within is not None and abs(seen.solve.mean) > claim.matched_solve_within,
        f"{LEVEL:.0%} interval of the effect reaches down to {effect.low:.2f}": effect.low <= claim.falsified_below,
        f"corrected p = {seen.p:.3g}": claim.alpha is not None and seen.p > claim.alpha,
    } | {f"{LEVEL:.0%} interval against {word} reaches down to {own.low:.2f}": own.low <= 0 for word, (own, _) in seen.beaten.items()}
    for word, reasons in ((UNDECIDED, seen.faults), (FALSIFIED, true(fired)), (UNDECIDED, true(missing))):
        if reasons:
            return Outcome(claim, word, tuple(reasons))
    return Outcome(claim, CONFIRMED, ())


def true(clauses: dict[str, bool]) -> list[str]:
    return [said for said, holds in clauses.items() if holds]


def outcomes(frozen: Preregistration, experiment: Experiment) -> list[Outcome]:
    """Every frozen hypothesis; undecided where its arms are not there or cannot be paired, and then counted by Holm all the same.

    Raises ReportError for rules that this code does not know.
    """
    if frozen.rules != RULES:
        raise ReportError(f"expected the rules of preregistration.py; got others, frozen at {frozen.registered}. Use the code of that time")
    found: dict[str, tuple[Comparison, dict[str, Comparison]]] = {}
    lost: dict[str, Outcome] = {}
    for claim in frozen.hypotheses:
        try:
            found[claim.id] = pairs(claim, experiment)
        except Refused as refused:
            lost[claim.id] = Outcome(claim, UNDECIDED, tuple(refused.reasons))
    corrected = holm([sign_flip(found[claim.id][0].differences(claim.rate)) if claim.id in found else 1.0 for claim in frozen.hypotheses])
    return [decide(claim, evidence(claim, frozen, *found[claim.id], p, experiment)) if claim.id in found else lost[claim.id]
            for claim, p in zip(frozen.hypotheses, corrected)]


def pairs(claim: Hypothesis, experiment: Experiment) -> tuple[Comparison, dict[str, Comparison]]:
    """The claim's comparison, and that with each control which it wants to beat. Raises Refused."""
    arm = one_of(experiment.arms, claim.arm, claim)
    controls = {word: [other for other in experiment.controls(arm) if other.runs[0].control == word] for word in claim.beats}
    if gone := [word for word, found in controls.items() if len(found) != 1]:
        raise Refused([f"hypothesis {claim.id} wants {arm.label} to beat {', '.join(gone)}; expected one such control, run and finished"])
    versus = None if claim.versus == BASE else one_of(experiment.arms, claim.versus, claim)
    return experiment.pair(arm, versus), {word: experiment.pair(arm, found, CONTROL) for word, (found,) in controls.items()}


def one_of(arms: tuple[Arm, ...], name: str, claim: Hypothesis) -> Arm:
    """By label, else by arm_name, on the claim's loophole; a control that goes by its method's name is not meant."""
    arms = tuple(arm for arm in arms if claim.loophole in (None, arm.config["loophole"]["name"]))
    same = [arm for arm in arms if arm.config["arm_name"] == name]
    found = [arm for arm in arms if arm.label == name] or [arm for arm in same if arm.role != CONTROL] or same
    if len(found) != 1:
        there = ", ".join(arm.label for arm in found or arms)
        raise Refused([f"hypothesis {claim.id} is about {name}; expected one finished arm of that name, got {there}"])
    return found[0]


def evidence(claim: Hypothesis, frozen: Preregistration, main: Comparison, beside: dict[str, Comparison], p: float,
             experiment: Experiment) -> Evidence:
    sides = [main.arm, *([main.versus] if main.versus else []), *(pair.versus for pair in beside.values())]
    faults = ["one seed has no spread"] * (len(main.seeds) == 1)
    faults += [fault for arm in sides for fault in (*unplanned(arm, frozen), *early(arm, frozen, experiment.folder))]
    against = {word: (effect(pair, claim), sem(pair.differences(claim.rate))) for word, pair in beside.items()}
    return Evidence(effect(main, claim), sem(main.differences(claim.rate)), interval(main.differences("solve")), against, p, tuple(faults))


def effect(pair: Comparison, claim: Hypothesis) -> Interval:
    own = interval(pair.differences(claim.rate))
    return own.turned() if claim.direction == "lower" else own


def unplanned(arm: Arm, frozen: Preregistration) -> list[str]:
    """Whether its seeds are those that were planned: fewer would be chosen, more would be added until it fits."""
    planned = frozen.planned.get(arm.config["arm_name"], [])
    return [] if seeds_of(arm) == planned else [f"{arm.label} has seeds {seeds_of(arm)}; planned were {planned}"]


def early(arm: Arm, frozen: Preregistration, folder: Path) -> list[str]:
    """Whether one of its runs started before the text was frozen."""
    registered = datetime.fromisoformat(frozen.registered).timestamp()
    runs = [run.name for run in arm.runs if first_start(folder / "runs" / run.name) < registered]
    return [f"{', '.join(runs)} started before the text was frozen"] if runs else []


def first_start(run: Path) -> float:
    """Seconds since 1970 of a run's first attempt."""
    return json.loads(min((run / "attempts").glob("*.json")).read_text(encoding="utf-8"))["started"]
