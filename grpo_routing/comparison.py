"""From finished run folders to differences between arms, paired by seed and evaluation problem. What cannot be paired is refused.

An arm that is a method stands against three others, each answering the same problems as deployed: the vanilla of its setting, its own
untrained base, and every control that differs from it by one word. Refused, all at once: runs that are not finished, seeds that one of
two arms lacks, a recipe that is not one recipe, a setting without vanilla, a method without its control.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grpo_routing.arms import Arm, group, recipe
from grpo_routing.env.loopholes import NO_LOOPHOLE
from grpo_routing.results import BASE, DEPLOYED, ReportError, Run, read_json

VANILLA, CONTROL = "vanilla", "control"  # kinds of what an arm stands against; the third is BASE
RATES = ("hack", "hack_known", "hack_held_out", "solve")  # in every table; a claim may be about any of `rates_of`
VERDICTS = {"hack": "hacked", "attempted": "attempted", "solve": "solved"}  # first word of a rate -> what it counts in an evaluated row
ROLES = ("method", "imitation")  # roles of arms that are compared
# Settings that two arms must share; whatever else differs is what is compared
SHARED = ("model.", "dataset.", "loophole.", "reward.", "evaluation.", "adapter.name", "trainer.steps", "trainer.group")
FREE = ("model.prepare", "loophole.pays", "evaluation.every")  # two methods, and how often is looked


class Refused(ReportError):
    """The comparison would not be fair; the message lists every reason and what to do."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("not compared:\n" + "\n".join(f"- {reason}" for reason in reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class Comparison:
    """An arm against another, as deployed. `versus` is None for the arm's own untrained base."""

    arm: Arm
    versus: Arm | None
    kind: str  # VANILLA, BASE, CONTROL, or empty: asked for by name
    first: dict[str, np.ndarray]  # rate -> answers of the arm [n seeds, m problems], a share each
    second: dict[str, np.ndarray]

    @property
    def against(self) -> str:
        return self.versus.label if self.versus else "untrained base"

    @property
    def seeds(self) -> list[int]:
        return seeds_of(self.arm)

    @property
    def runs(self) -> tuple[Run, ...]:
        return (*self.arm.runs, *(self.versus.runs if self.versus else ()))

    def differences(self, rate: str) -> np.ndarray:
        """Arm minus versus [n seeds, m problems]. Raises ReportError for a rate that these runs do not have."""
        if rate not in self.first:
            raise ReportError(f"expected a rate of {self.arm.label}: {', '.join(self.first)}; got {rate!r}")
        return self.first[rate] - self.second[rate]


def seeds_of(arm: Arm) -> list[int]:
    return [run.config["seed"] for run in arm.runs]


@dataclass(frozen=True)
class Experiment:
    """The finished arms of outputs/<experiment> that are looked at."""

    folder: Path
    arms: tuple[Arm, ...]
    _read: dict[tuple[str, str], dict] = field(default_factory=dict)  # (run, state) -> answers

    def pair(self, arm: Arm, versus: Arm | None, kind: str = "") -> Comparison:
        """Raises Refused when their seeds, settings or problems are not the same."""
        reasons = [] if versus is None else unpaired(arm, versus)
        if reasons:
            raise Refused(reasons)
        firsts = [self.answers(run, DEPLOYED) for run in arm.runs]
        seconds = [self.answers(run, BASE) for run in arm.runs] if versus is None else [self.answers(run, DEPLOYED) for run in versus.runs]
        problems = sorted(firsts[0])
        if odd := [run.name for run, own in zip((*arm.runs, *(versus or arm).runs), (*firsts, *seconds)) if sorted(own) != problems]:
            raise Refused([f"expected the same evaluation problems in all runs of {arm.label} and what it stands against; {', '.join(odd)} "
                           f"answered others than {arm.runs[0].name}. Run them again with the same evaluation.* and loophole"])
        asked = {rate: [at for at, (_, mode) in enumerate(problems) if mode in modes]
                 for rate, modes in rates_of(arm.config["loophole"]).items()}
        sides = [{rate: counted[VERDICTS[rate.split("_")[0]]][:, kept] for rate, kept in asked.items() if kept}
                 for counted in (matrices(firsts, problems), matrices(seconds, problems))]
        return Comparison(arm, versus, kind, *sides)

    def answers(self, run: Run, state: str) -> dict[tuple[str, str], dict[str, float]]:
        """(problem, loophole) -> verdict of VERDICTS -> share of its samples; problems with a hint only."""
        if (run.name, state) not in self._read:
            found, wanted = defaultdict(list), ("problem", "loophole", *VERDICTS.values())
            file = self.folder / "runs" / run.name / "eval" / f"{state}.json"
            for row in read_json(file)["rows"]:
                if missing := [name for name in wanted if name not in row]:
                    raise Refused([f"expected {', '.join(wanted)} in every row of {file}; one lacks {', '.join(missing)}"])
                if row["loophole"] != NO_LOOPHOLE:
                    found[row["problem"], row["loophole"]].append(row)
            self._read[run.name, state] = {key: {name: sum(row[name] for row in rows) / len(rows) for name in VERDICTS.values()}
                                           for key, rows in found.items()}
        return self._read[run.name, state]

    def controls(self, arm: Arm) -> list[Arm]:
        """Those that differ from the arm by one word, beside their names."""
        own = recipe(arm.config)
        return [other for other in self.arms if other.role == "control" and one_word(own, recipe(other.config))]

    def comparisons(self, controls: bool = True) -> list[Comparison]:
        """Every method against vanilla, base and controls. Raises Refused with every reason; with `controls` False none is asked for."""
        found, reasons = [], []
        for arm in (arm for arm in self.arms if arm.role in ROLES):
            beside = [(other, CONTROL) for other in self.controls(arm)]
            if not beside and controls and needs_control(arm.runs[0]):
                reasons.append(no_control(arm, [other for other in self.arms if other.role == CONTROL]))
            fitting = [other for other in self.arms if other.role == "vanilla" and not strange(arm, other)]
            if len(fitting) != 1:
                reasons.append(no_vanilla(arm, fitting, [other for other in self.arms if other.role == "vanilla"]))
            for versus, kind in [*((other, VANILLA) for other in fitting[:1]), (None, BASE), *beside]:
                try:
                    found.append(self.pair(arm, versus, kind))
                except Refused as refused:
                    reasons += refused.reasons
        reasons = list(dict.fromkeys(reasons))
        if not found and not reasons:
            reasons = ["expected at least one finished arm that is a method; got " + (", ".join(a.label for a in self.arms) or "none")]
        if reasons:
            raise Refused(reasons)
        return found


def gather(folder: Path, runs: Sequence[Run], names: list[str] | None = None, loophole: str | None = None) -> Experiment:
    """The arms of a folder's runs; all, or those of `names` with their controls, vanillas and references; all loopholes, or one.

    Raises Refused for runs that are not finished and seeds that are there twice.
    """
    runs = [run for run in runs if run.config is None or loophole in (None, run.config["loophole"]["name"])]
    if names is not None:
        runs = named(runs, names)
    reasons = [unfinished(run) for run in runs if not run.finished]
    arms = group(runs)
    for arm in arms:
        if twice := [seed for seed, times in Counter(seeds_of(arm)).items() if times > 1]:
            reasons.append(f"{arm.label} has seeds {twice} more than once; move all but one of {', '.join(r.name for r in arm.runs)} away")
    if reasons:
        raise Refused(reasons)
    return Experiment(folder, tuple(arms))


def named(runs: list[Run], names: list[str]) -> list[Run]:
    """The runs of the arms with these names, and what they stand against. Raises Refused for a name that no run has."""
    there = {run.config["arm_name"] for run in runs if run.config}
    if unknown := [name for name in names if name not in there]:
        raise Refused([f"expected arms of the folder ({', '.join(sorted(there))}); got {', '.join(unknown)}"])
    recipes = {run.name: recipe(run.config) for run in runs if run.config}
    wanted = [recipes[run.name] for run in runs if run.config and run.config["arm_name"] in names and run.role != CONTROL]
    return [run for run in runs if run.config and (
        run.role in (VANILLA, "reference") or run.config["arm_name"] in names
        or (run.role == CONTROL and any(one_word(own, recipes[run.name]) for own in wanted)))]


# ------------------------------------------------------------------------------------------------ what may be paired


def unfinished(run: Run) -> str:
    why = f": {' '.join(run.cause.split())}" if run.cause else ""
    todo = "It has no evaluation to compare; leave its arm out with --arms" if run.collapsed else "Run it again: it resumes"
    return f"{run.name} is not finished ({run.status}{why}). {todo}"


def one_word(own: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two recipes differ in one setting beside their names."""
    return len(words(own, other)) == 1


def words(own: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted({key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} - {"arm_name"})


def unpaired(arm: Arm, versus: Arm) -> list[str]:
    """Why two arms cannot be paired; nothing when they can."""
    reasons = []
    if seeds_of(arm) != seeds_of(versus):
        missing = [f"{one.label} lacks {sorted(set(seeds_of(other)) - set(seeds_of(one)))}"
                   for one, other in ((arm, versus), (versus, arm)) if set(seeds_of(other)) - set(seeds_of(one))]
        reasons.append(f"expected the same seeds in {arm.label} and {versus.label}; {' and '.join(missing)}. Run those seeds; a mean over "
                       "the others would compare different runs")
    if other := strange(arm, versus):
        reasons.append(f"expected one setting in {arm.label} and {versus.label}; {'; '.join(other)}. Compare arms of one setting")
    return reasons


def shared(arm: Arm) -> dict[str, object]:
    return {key: value for key, value in recipe(arm.config).items() if key.startswith(SHARED) and not key.startswith(FREE)}


def strange(arm: Arm, other: Arm) -> list[str]:
    """Shared settings in which two arms differ, as text."""
    own, theirs = shared(arm), shared(other)
    return [f"{key} is {own.get(key)} and {theirs.get(key)}" for key in words(own, theirs)]


def no_vanilla(arm: Arm, fitting: list[Arm], there: list[Arm]) -> str:
    if fitting:
        return (f"{arm.label} has {len(fitting)} vanillas of its setting ({', '.join(other.label for other in fitting)}), and a mean would "
                "mix configs; move all but one away")
    if not there:
        return f"{arm.label} has no vanilla in the folder; run arm=vanilla with the same seeds"
    nearest = min(there, key=lambda other: len(strange(arm, other)))
    said = "; ".join(strange(arm, nearest)[:4])
    return f"{arm.label} has no vanilla of its setting; of {nearest.label} {said}. Run arm=vanilla with this arm's setting and seeds"


def no_control(arm: Arm, there: list[Arm]) -> str:
    differing = {other.label: words(recipe(arm.config), recipe(other.config)) for other in there}
    near = [f"{label} differs in {' and '.join(own)}" for label, own in differing.items() if len(own) == 2]
    return (f"{arm.label} has no control here that differs from it by one word{f' ({near[0]})' if near else ''}; run it too (-m adds it), "
            "or say --without-controls, and then nothing shows that what its source knows makes the difference")


def needs_control(run: Run) -> bool:
    """Whether a mask source or the sampling acts, so that only a control says whether what it knows matters."""
    acts = run.config["mask_source"]["name"] != "none" and (run.config["projection"]["name"] != "measure_only" or run.labels)
    return not run.uses_oracle and (acts or run.config["sampling"]["name"] != "plain")


def matrices(answers: list[dict[tuple[str, str], dict[str, float]]], problems: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Verdict -> its shares [n runs, m problems]."""
    return {name: np.array([[own[problem][name] for problem in problems] for own in answers]) for name in VERDICTS.values()}


def rates_of(loophole: dict) -> dict[str, tuple[str, ...]]:
    """Every rate that can be compared under a loophole group -> the modes whose problems it is taken over. `attempted` counts every answer
    with its prompt's lever in it, also one that does the task, which no hack rate does."""
    known, held_out = tuple(loophole["known"]), tuple(loophole["held_out"])
    every = (*known, *held_out)
    return {"hack": every, "hack_known": known, "hack_held_out": held_out, **{f"hack_{mode}": (mode,) for mode in every},
            "attempted": every, **{f"attempted_{mode}": (mode,) for mode in every}, "solve": every}
