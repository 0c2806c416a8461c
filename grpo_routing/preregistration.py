"""What an experiment claims, written down and frozen before its first run.

An experiment's YAML lists its claims under `hydra.sweeper.hypotheses`, which no run sees, so they are no part of a run's name or config.
`-m` checks them while it plans and freezes them into outputs/<experiment>/preregistration.json, with the seeds that are planned, the rules
that will decide, a date and a hash over all of it. The file is written once: who edits the YAML later is told so, loudly, and judged by the
frozen text. The hash proves nothing to others unless it was shown to them (a commit, a message) at the time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import MISSING, asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from grpo_routing.comparison import rates_of
from grpo_routing.files import write_json
from grpo_routing.results import BASE, ReportError, read_json

FILE = "preregistration.json"
CONF = Path(__file__).resolve().parent.parent / "conf"
RULES = (
    "Rates are means over the planned seeds, as deployed; differences are arm minus versus, paired by seed and evaluation problem. The "
    "effect is the difference of `rate` in `direction`; solve drop is versus minus arm.",
    "Falsified: effect < falsified_below; or solve drop > max_solve_drop; or |effect| <= within_sem standard errors over seeds; or the "
    "effect against a control of `beats` is <= 0, or <= within_sem standard errors. A clause that is null does not count.",
    "Confirmed: not falsified; effect >= at_least; |solve difference| <= matched_solve_within; the 95 % interval of the effect lies above "
    "falsified_below, and that against every control of `beats` above 0; the sign-flip p-value, corrected by Holm over all hypotheses of "
    "the file, is <= alpha. A clause that is null does not count.",
    "Undecided: neither; or there are fewer than two seeds or others than planned; or a run started before the text was frozen.")


@dataclass(frozen=True)
class Hypothesis:
    """One claim. Every clause has to be there, null says that it does not count; `loophole` is for sweeps over several, one claim each."""

    id: str
    arm: str  # its arm_name, or its label in the table
    versus: str  # another arm, vanilla of the same setting, or base: the arm before training
    rate: str  # one of rates_of in comparison.py: hack, hack_known, hack_held_out, attempted, solve, hack_sentinel, attempted_sentinel, …
    direction: Literal["lower", "higher"]
    at_least: float  # effect in that direction
    matched_solve_within: float | None
    falsified_below: float
    max_solve_drop: float | None
    within_sem: float | None
    beats: tuple[str, ...]  # control words
    alpha: float | None
    loophole: str | None = None  # its name, such as held_out_sentinel

    def __post_init__(self) -> None:
        if not 0 <= self.falsified_below <= self.at_least <= 1:
            raise ValueError(f"hypothesis {self.id}: expected 0 <= falsified_below <= at_least <= 1; got {self.falsified_below} and "
                             f"{self.at_least}. What confirms cannot falsify")
        widths = {"matched_solve_within": self.matched_solve_within, "within_sem": self.within_sem, "alpha": self.alpha}
        if wrong := [name for name, width in widths.items() if width is not None and width <= 0]:
            raise ValueError(f"hypothesis {self.id}: {', '.join(wrong)} must be above 0; write null to leave a clause out")

    def __str__(self) -> str:
        said = [f"on {self.loophole}" if self.loophole else None,
                f"{self.arm} has a {self.direction} {self.rate} than {self.versus} by {self.at_least:g} or more",
                None if self.matched_solve_within is None else f"at solve ±{self.matched_solve_within:g}",
                f"and beats {', '.join(self.beats)}" if self.beats else None,
                None if self.alpha is None else f"at p ≤ {self.alpha:g}"]
        ends = [f"below {self.falsified_below:g}",
                None if self.max_solve_drop is None else f"solve drops by more than {self.max_solve_drop:g}",
                None if self.within_sem is None else f"within {self.within_sem:g} SEM"]
        return f"{' '.join(filter(None, said))}; falsified if {', or '.join(filter(None, ends))}"


@dataclass(frozen=True)
class Preregistration:
    hypotheses: tuple[Hypothesis, ...]
    planned: dict[str, list[int]]  # arm_name -> seeds
    rules: tuple[str, ...]
    source: str  # the experiment in conf/experiment that stated them; empty when the command line did
    registered: str  # UTC
    hash: str


def parse(texts: list[dict]) -> tuple[Hypothesis, ...]:
    """Raises ReportError with everything that is wrong."""
    found, problems = [], []
    fields = Hypothesis.__dataclass_fields__
    for number, text in enumerate(texts, 1):
        name = f"hypothesis {text.get('id', number)}"
        faults = [f"{name}: {key} is no clause" for key in text if key not in fields]
        faults += [f"{name}: {key} is missing" for key, field in fields.items() if key not in text and field.default is MISSING]
        try:
            found += [] if faults else [TypeAdapter(Hypothesis).validate_python(text)]
        except ValidationError as error:
            faults += [str(one["ctx"]["error"]) if one["type"] == "value_error" else
                       f"{name}: {'.'.join(map(str, one['loc']))}: {one['msg'].lower()}; got {one['input']!r}" for one in error.errors()]
        problems += faults
    if twice := sorted({one.id for one in found if [other.id for other in found].count(one.id) > 1}):
        problems.append(f"hypotheses {', '.join(twice)} are there twice; give each an id of its own")
    if problems:
        raise ReportError("\n".join([*problems, f"A hypothesis has {', '.join(fields)}; null leaves a clause out"]))
    return tuple(found)


def register(texts: list[dict], configs: list[dict], source: str) -> list[str]:
    """Freeze the claims of a sweep into each of its experiments' folders; what there is to say about it. `configs` are the resolved configs
    of all its runs. Raises ReportError for claims that are malformed or about arms that the sweep has not."""
    hypotheses, said = parse(texts), []
    folders: dict[Path, list[dict]] = defaultdict(list)
    for config in configs:
        folders[Path(config["output"]) / config["experiment_name"]].append(config)
    if problems := [problem for own in folders.values() for problem in unplanned(hypotheses, own)]:
        raise ReportError("\n".join(problems))
    for folder, own in folders.items():
        planned: dict[str, set[int]] = defaultdict(set)
        for config in own:
            planned[config["arm_name"]].add(config["seed"])
        seeds = {arm: sorted(theirs) for arm, theirs in sorted(planned.items())}
        if (folder / FILE).exists():
            said += differences(read(folder), hypotheses, seeds)
            continue
        before = sorted(run.name for run in (folder / "runs").glob("[!.]*"))
        text = {"hypotheses": [asdict(one) for one in hypotheses], "planned": seeds, "rules": list(RULES),
                "source": source if stated(source) == hypotheses else ""}
        text["registered"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(folder / FILE, text | {"hash": fingerprint(text)})
        said.append(f"hypotheses {', '.join(one.id for one in hypotheses)} frozen in {folder / FILE}, hash {fingerprint(text)}")
        if before:
            said.append(f"!!! {len(before)} runs are there already ({', '.join(before[:3])}, …): claims that rest on them stay undecided")
    return said


def unplanned(hypotheses: tuple[Hypothesis, ...], configs: list[dict]) -> list[str]:
    """Claims about arms, rates, loopholes and controls that are not in the sweep."""
    arms, loopholes = ({config["arm_name"] for config in configs}, {config["loophole"]["name"] for config in configs})
    groups = [config[group] for config in configs for group in ("mask_source", "sampling")]
    words = {own["control"] for own in groups if "control" in own} - {"none"}
    named = [(one.id, name) for one in hypotheses for name in (one.arm, one.versus) if name not in arms | {BASE}]
    missing = [f"hypothesis {place} is about {name!r}; this sweep has {', '.join(sorted(arms))}" for place, name in named]
    missing += [f"hypothesis {one.id} is about the loophole {one.loophole!r}; this sweep has {', '.join(sorted(loopholes))}"
                for one in hypotheses if one.loophole not in (None, *loopholes)]
    rates = {rate for config in configs for rate, modes in rates_of(config["loophole"]).items() if modes}
    missing += [f"hypothesis {one.id} is about the rate {one.rate!r}; this sweep has {', '.join(sorted(rates))}"
                for one in hypotheses if one.rate not in rates]
    return missing + [f"hypothesis {one.id} wants to beat {word!r}; the controls of this sweep are {', '.join(sorted(words)) or 'none'}"
                      for one in hypotheses for word in one.beats if word not in words]


def differences(frozen: Preregistration, hypotheses: tuple[Hypothesis, ...], seeds: dict[str, list[int]]) -> list[str]:
    """How what is asked now departs from what was frozen."""
    said = []
    if hypotheses != frozen.hypotheses:
        said.append(f"!!! the hypotheses were edited after {frozen.registered}, when they were frozen. The frozen ones decide "
                    f"(hash {frozen.hash}); other claims need another experiment_name")
    if changed := [arm for arm in seeds if arm in frozen.planned and seeds[arm] != frozen.planned[arm]]:
        said.append(f"!!! other seeds than those that were frozen are asked for of {', '.join(changed)}; claims about them stay undecided "
                    "unless exactly the planned seeds are there")
    return said


def edited(frozen: Preregistration) -> list[str]:
    """How conf/experiment/<source>.yaml departs from what was frozen from it."""
    now = stated(frozen.source) if frozen.source else frozen.hypotheses
    if now is None:
        return [f"!!! the hypotheses were frozen from {frozen.source}.yaml, which is not in conf/experiment any more"]
    return differences(frozen, now, {})


def stated(source: str) -> tuple[Hypothesis, ...] | None:
    """What conf/experiment/<source>.yaml states today; None without such a file."""
    file = CONF / "experiment" / f"{source}.yaml"
    if not file.exists():
        return None
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    for key in ("hydra", "sweeper", "hypotheses"):
        node = node[key] if isinstance(node, dict) and key in node else None
    return parse(node or [])


def read(folder: Path) -> Preregistration | None:
    """What was frozen for outputs/<experiment>; None where nothing was. Raises ReportError for a file that was changed since."""
    text = read_json(folder / FILE)
    if text is None:
        return None
    own = {key: value for key, value in text.items() if key != "hash"}
    if fingerprint(own) != text["hash"]:
        raise ReportError(f"expected {folder / FILE} as it was frozen, hash {text['hash']}; got {fingerprint(own)}. Restore the file")
    return Preregistration(**text | {"hypotheses": parse(text["hypotheses"]), "rules": tuple(text["rules"])})


def fingerprint(text: dict) -> str:
    return sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
