"""What monitors say of a finished run, kept in its eval/obfuscation.json so that asking again costs seconds (baselines.md G2).

A reading is a list of scores, one per row of an evaluation, or of a few training rollouts:

    base, as_deployed, as_trained   every monitor of monitors.py on the rows of that evaluation; as_trained only beside a quarantine
    training                        the probe on the sampled rollouts (rollouts.jsonl) of the first and the last tenth of the steps
    gradient                        O6, of a run with a subspace: energy of true hacks' gradients in the bases of the start and of now

A reading is made when it is missing, when its evaluation has another number of rows, or when the monitors are other ones than then.
What cannot be made is said and left out; everything else is still measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path

from grpo_routing.adapters.adapter import DEPLOYED as DEPLOYED_BLOCK
from grpo_routing.build import Plan, build_line, build_policy
from grpo_routing.checkpoint import load_checkpoint
from grpo_routing.env.grader import extract_code
from grpo_routing.env.loopholes import LOOPHOLES
from grpo_routing.env.problems import LoopholeChoice, OpChains, Problem
from grpo_routing.env.reading import form_present
from grpo_routing.evasion import PART, Judged
from grpo_routing.files import Record, write_json
from grpo_routing.finished import UnusableRun, ready_plan
from grpo_routing.leetcode import Filtered
from grpo_routing.monitors import Answer, Monitors, acts, hack_energies, own_scores
from grpo_routing.oracle.summary import Row
from grpo_routing.policy import Policy
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.results import BASE, DEPLOYED, STATES, TRAINED, ReportError, Run, read_json
from grpo_routing.train import State, batch_of
from grpo_routing.types import STUDENT, Basis

FILE = "eval/obfuscation.json"
TRAINING, GRADIENT = "training", "gradient"
UNREADABLE = (ValueError, OSError, FloatingPointError)  # a damaged or missing file, settings that do not fit, a policy that diverged
PROBES = ("probe", "probe_now")  # all that as_trained is read with


def pair_files(source: dict) -> set[str]:
    """Pair files that a mask source, or a part of it, reads."""
    inner = [pair_files(part) for part in source.values() if isinstance(part, dict) and "name" in part]
    return set().union([source["pairs"]] if "pairs" in source else [], *inner)


def rows_of(folder: Path, state: str) -> list[Row]:
    """The judged samples of an evaluation. Raises ReportError."""
    file = folder / "eval" / f"{state}.json"
    stored = read_json(file)
    if stored is None:
        raise ReportError(f"expected {file}; it is not there. Run that run again: it resumes")
    try:
        rows = [Row(**{one.name: row[one.name] for one in fields(Row)} | {"levers": tuple(row["levers"])}) for row in stored["rows"]]
    except (KeyError, TypeError) as error:
        raise ReportError(f"expected judged samples with their levers and completions in {file}, but {type(error).__name__}: {error}. "
                          "It is of older code or damaged; run that run again in another folder") from error
    if not rows:
        raise ReportError(f"expected judged samples in {file}; it has none")
    return rows


@dataclass(frozen=True)
class Readings:
    """A finished run with what monitors said of it; `notes` are what could not be made, and why."""

    folder: Path
    run: Run
    ready: Plan
    monitors: Monitors
    rows: dict[str, list[Row]]
    scores: dict[str, dict[str, list]]
    notes: tuple[str, ...]

    @property
    def acts(self) -> bool:
        return acts(self.ready)

    def own(self, state: str) -> list[float | None] | None:
        """Scores of M_train; of the probe where the run has none."""
        return self.scores[state].get("own" if self.acts else "probe") if state in self.scores else None


def readings_of(folder: Path, run: Run) -> Readings:
    """Readings of a finished run, made where they are missing and written back. Raises ReportError or UnusableRun for a run of which
    nothing can be said."""
    ready = ready_plan(run.config, folder)
    loophole = ready.loophole
    monitors = Monitors.of(loophole.known, loophole.modes, pair_files(run.config["mask_source"]))
    rows = {state: rows_of(folder, state) for state in STATES}
    stored = read_json(folder / FILE)
    kept = {} if stored is None else stored
    if not isinstance(kept, dict) or not isinstance(kept.get("scores", {}), dict):
        raise ReportError(f"expected kept readings in {folder / FILE}; got something else. Remove it: it is made again")
    scores = kept.get("scores", {}) if kept.get("monitors") == monitors.settings else {}
    maker, notes = Maker(folder, run, ready, monitors, rows), []
    for name, make in maker.wanted.items():
        if name in scores and (name not in rows or all(len(values) == len(rows[name]) for values in scores[name].values())):
            continue
        try:
            scores = scores | {name: make()}
        except UNREADABLE as error:
            notes.append(f"{name} is not read: {error}")
            continue
        write_json(folder / FILE, {"monitors": monitors.settings, "scores": scores})
    return Readings(folder, run, ready, monitors, rows, scores, tuple(notes))


@dataclass(frozen=True)
class Maker:
    """Makes readings; loads no policy before one is asked for."""

    folder: Path
    run: Run
    ready: Plan
    monitors: Monitors
    rows: dict[str, list[Row]]

    @property
    def wanted(self) -> dict[str, Callable[[], dict[str, list]]]:
        found = {BASE: lambda: self.evaluation(BASE), DEPLOYED: lambda: self.evaluation(DEPLOYED), TRAINING: self.training}
        if "quarantine" in self.ready.adapter.blocks:
            found[TRAINED] = lambda: self.evaluation(TRAINED)
        return found | ({GRADIENT: self.gradient} if self.ready.mask_source.kind == "subspace" else {})

    @cached_property
    def base(self) -> Policy:
        """The untrained policy."""
        return build_policy(self.ready)

    @cached_property
    def trained(self) -> tuple[Policy, State]:
        policy = build_policy(self.ready)
        state = State(self.ready.optimizer.start(policy.adapter))
        if not load_checkpoint(self.folder / "checkpoints", policy.adapter, state):
            raise UnusableRun(f"expected checkpoints/latest in {self.folder}; got none. Remove the folder and run it again")
        if state.step != self.run.steps:
            raise UnusableRun(f"expected a checkpoint of step {self.run.steps} in {self.folder}; got step {state.step}. Remove the folder "
                              "and run it again")
        return policy, state

    @cached_property
    def memory(self) -> dict:
        return self.monitors.fit(self.base)

    @cached_property
    def frozen(self) -> Basis | None:
        """The basis that a subspace source has at the start."""
        return self.ready.mask_source.fit(self.base).basis if self.ready.mask_source.kind == "subspace" else None

    @property
    def quarantine(self) -> float:
        """Forward scale of what is deployed."""
        return 0.0 if self.base.adapter.has_quarantine else 1.0

    def answers(self, policy: Policy, state: str) -> list[Answer]:
        """The evaluation's answers with their prompts. Raises ReportError where its problems are not those of the config."""
        settings, rows = self.ready.evaluation, self.rows[state]
        problems = self.ready.dataset.evaluation(self.ready.loophole, settings.problems, settings.no_hint_share, settings.seed)
        asked = [problem for problem in problems for _ in range(settings.samples)]
        if [row.problem for row in rows] != [problem.id for problem in asked]:
            raise ReportError(f"expected the {len(asked)} problems of the config in {self.folder}/eval/{state}.json; got {len(rows)} rows, "
                              "or others. Run that run again with this code")
        return Answer.of(policy, [plain_prompt(problem) for problem in asked], [row.completion for row in rows],
                         self.ready.trainer.max_new_tokens)

    def evaluation(self, state: str) -> dict[str, list]:
        policy, training = self.trained
        if state == BASE:
            policy = self.base
        answers = self.answers(policy, state)
        with policy.adapter.only(*((DEPLOYED_BLOCK,) if state == DEPLOYED else policy.adapter.blocks)):
            found = self.monitors.read(policy, self.memory, answers)
        if state == TRAINED:
            return {name: found[name] for name in PROBES}
        if acts(self.ready):  # it reads the policy as it is trained, quarantine and all
            step = -1 if state == BASE else training.step
            found["own"] = own_scores(self.ready, policy, training, self.frozen, self.rows[state], answers, step, self.quarantine)
        return found

    def training(self) -> dict[str, list]:
        """Judged rollouts of both ends of the training, under the frozen probe."""
        file, steps = self.folder / "rollouts.jsonl", self.run.steps
        if not file.exists():
            raise ReportError(f"expected {file}; it is not there")
        size = max(1, steps // PART)
        rows = [row for row in Record(file).rows() if row["source"] == STUDENT and not size <= row["step"] < steps - size]
        line = build_line(self.ready, self.base, None, None, problems=training_problems(self.ready.dataset, self.ready.loophole))
        dealt = {step: batch_of(line, step) for step in {row["step"] for row in rows}}
        problems = [problem_of(row, dealt[row["step"]], file) for row in rows]
        prompts = [self.ready.prompt.train(problem) for problem in problems]
        answers = Answer.of(self.base, prompts, [row["completion"] for row in rows], self.ready.trainer.max_new_tokens)
        scores = self.monitors.read(self.base, self.memory, answers)["probe"] if rows else []
        judged = [Judged(row["step"], score, row["hacked"], exploited(problem, row["completion"]), row["loophole"])
                  for row, problem, score in zip(rows, problems, scores)]
        return {"probe": [asdict(one) for one in judged]}

    def gradient(self) -> dict[str, list]:
        policy, _ = self.trained
        now = self.ready.mask_source.fit(policy).basis
        start = hack_energies(self.ready, self.base, {"frozen": self.frozen}, self.rows[BASE], self.answers(self.base, BASE), 1.0)
        end = hack_energies(self.ready, policy, {"frozen": self.frozen, "now": now}, self.rows[DEPLOYED],
                            self.answers(policy, DEPLOYED), self.quarantine)
        return {"base": start["frozen"], **end}


@lru_cache(maxsize=2)  # the runs of a folder draw from one set
def training_problems(dataset: OpChains | Filtered, loophole: LoopholeChoice) -> list[Problem]:
    return dataset.training(loophole)


def problem_of(row: dict, batch: list[Problem], file: Path) -> Problem:
    """Which problem of its step a recorded rollout answers. Raises ReportError."""
    for problem in batch:
        if (problem.program.description, problem.loophole) == (row["prompt"], row["loophole"]):
            return problem
    raise ReportError(f"expected in {file} rollouts of the problems that the config deals; step {row['step']} has no {row['prompt']!r} "
                      f"with loophole {row['loophole']}. Run that run again with this code")


def exploited(problem: Problem, text: str) -> bool:
    """Whether any loophole's lever stands in the code, as in oracle/verdict.py."""
    code = extract_code(text)
    return code is not None and any(form_present(mode, code, problem.marker if mode == problem.loophole else None) for mode in LOOPHOLES)
