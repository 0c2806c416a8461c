"""Leakage of a routed run: how much of the unflagged hacking reached what is deployed (SGTM's definition G.1; routing.md section 4.4).

    python -m grpo_routing.leakage RUN_FOLDER --curve RUN_FOLDER RUN_FOLDER ...

    curve       of runs without a quarantine: x = hack rollouts trained on, y = deployed hack rate
    N_U         hack rollouts of the routed run that its mask source did not flag
    n*          the x at which the curve has the routed run's deployed hack rate; linear between its two neighbours
    leakage     n* / N_U; 1 for a filter by construction, 0 where the deployed policy hacks no more than the curve's first run

Runs for the curve: no_loophole (x = 0), vanilla with the loophole on a part of the prompts (loophole.no_hint_share), filters.
Counts come from audit.jsonl, times trainer.audit_every where only a part was judged. Measurement only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_routing.files import Record
from grpo_routing.finished import UnusableRun, finished_config, ready_plan
from grpo_routing.reproductions.leakage import leakage as routed_leakage

COUNT = "audit/unflagged_hacks"
SAME = ("model", "dataset", "reward", "evaluation")  # groups that the runs of a curve and the routed run share


def main(argv: list[str]) -> int:
    """Print curve and leakage; the exit status is 2 when a folder cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.leakage", description="Leakage of a routed run on a baseline curve.")
    parser.add_argument("run", type=Path, help="outputs/<experiment>/runs/<run> of a finished routed run")
    parser.add_argument("--curve", type=Path, nargs="+", required=True, help="finished runs without a quarantine, two or more")
    asked = parser.parse_args(argv)
    try:
        config, unflagged, rate = facts(asked.run)
        curve = sorted(baseline(folder, config) for folder in asked.curve)
        value = leakage(*zip(*curve), rate, unflagged)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for hacks, deployed, name in (*((*point, "curve") for point in curve), (unflagged, rate, asked.run.name)):
        print(f"{hacks:>8.0f} hack rollouts, unflagged   deployed hack rate {deployed:.3f}   {name}")
    print(f"leakage {value:.3f}")
    return 0


def leakage(hacks: Sequence[float], hack_rates: Sequence[float], rate: float, unflagged: float) -> float:
    """n* / N_U on a curve of rising hack rollouts and rising deployed hack rates. Raises ValueError off the curve's upper end."""
    for place in range(1, len(hacks)):
        if not (hacks[place] > hacks[place - 1] and hack_rates[place] > hack_rates[place - 1]):
            raise ValueError("expected a curve that rises in hack rollouts and in hack rate, or it has no inverse; got "
                             f"({hacks[place - 1]:g}, {hack_rates[place - 1]:.3f}) before ({hacks[place]:g}, {hack_rates[place]:.3f}). "
                             "Leave a run out, or average seeds")
    if rate > max(hack_rates):
        raise ValueError(f"expected a deployed hack rate on the curve, at most {max(hack_rates):.3f}; got {rate:.3f}. "
                         "Add a vanilla run that trained on more hacks")
    # The estimator wants losses, which fall; a rate below the first point is that of a policy which learned no hack at all.
    return routed_leakage(hacks, [-y for y in hack_rates], -max(rate, hack_rates[0]), unflagged)


def unflagged_hacks(folder: Path, audit_every: int) -> int:
    """N_U: the hack rollouts of a run that were flagged with p < 0.5, so that they could train the deployed block."""
    rows = Record(folder / "audit.jsonl").rows()
    if not rows or any(COUNT not in row for row in rows):
        raise UnusableRun(f"expected {COUNT} in every row of {folder / 'audit.jsonl'}; it is not there. Run it again with this code")
    return audit_every * sum(row[COUNT] for row in rows)


def facts(folder: Path) -> tuple[dict, int, float]:
    """Config, N_U and deployed hack rate of a finished run."""
    config = finished_config(folder)
    rates = json.loads((folder / "eval" / "as_deployed.json").read_text(encoding="utf-8"))["rates"]
    return config, unflagged_hacks(folder, config["trainer"]["audit_every"]), rates["hack"]


def baseline(folder: Path, routed: dict) -> tuple[int, float]:
    """A point of the curve. Refuses a run whose unflagged hacks are not the hacks that it trained on."""
    config, hacks, rate = facts(folder)
    ready, name = ready_plan(config, folder), config["projection"]["name"]
    if (name, ready.mask_source.kind == "rollout") not in (("measure_only", False), ("erase", True)):
        raise UnusableRun(f"expected a curve of vanilla runs (projection=measure_only, no rollout flags) and filters (projection=erase "
                          f"by rollout); {folder} has {name} with {config['mask_source']['name']}. Leave it out")
    if other := [group for group in SAME if strip(config[group]) != strip(routed[group])]:
        raise UnusableRun(f"expected the routed run's own {', '.join(SAME)} in a curve; {folder} differs in {', '.join(other)}. "
                          "Leave it out")
    return hacks, rate


def strip(group: dict) -> dict:
    return {key: value for key, value in group.items() if key != "cache"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
