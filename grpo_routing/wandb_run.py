"""One W&B run per run folder: what W&B is told of a run, and how. The folder's files are the record, W&B is a view of them.

A run is replayed from files whose attempts are merged already, under an id that follows from experiment and folder. Without `resume`, W&B
lets a run that comes again under its id replace the one before, online and at `wandb sync` (docs/wandb.md). A receipt beside the
replay says what was published; it is removed before and written after, so a publication that was cut short leaves none.

    config      flat keys to group by: arm, role, loophole, projection, …; `recipe` is what seeds share, `settings` the whole frozen config
    history     METRICS and the evaluations over trainer/step: row s has training step s, and the policy that s steps had trained
    summary     the evaluations as they ended, base included, and the means over the last training steps
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from grpo_routing.arms import recipe
from grpo_routing.files import Record, claimed, write_json
from grpo_routing.log import METRICS
from grpo_routing.results import BASE, DEPLOYED, LAST, STATES, ReportError, Run, read_json

STEP = "trainer/step"
RECEIPT = Path("wandb") / "receipt.json"
MODES = ("offline", "online")
PLACES = ("output", "cache", "logger", "experiment_name")  # settings that say where things go
GROUPED = ("model", "loophole", "projection", "mask_source", "adapter", "advantage", "prompt", "sampling", "extra_rollouts", "optimizer")
# Nobody asked to show machine, program, code or packages; and a replay has nothing to watch.
QUIET = {"silent": True, "console": "off", "host": "", "disable_git": True, "disable_code": True, "disable_job_creation": True,
         "save_code": False, "x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}


@dataclass(frozen=True)
class Target:
    """Where runs go. Without an entity W&B takes the default one of who is logged in."""

    project: str
    entity: str | None
    mode: str  # offline or online

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"expected mode offline or online; got {self.mode!r}")


@dataclass(frozen=True)
class Publication:
    """What W&B is told of one run."""

    name: str
    group: str  # the experiment
    tags: tuple[str, ...]
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]  # a row per trainer/step that has anything; what was not measured is absent
    completions: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    finished: bool  # else W&B shows it as failed; config.status says which

    @property
    def id(self) -> str:
        """The same run may belong to two experiments."""
        return sha256(f"{self.group}/{self.name}".encode()).hexdigest()[:12]

    @property
    def fingerprint(self) -> str:
        return hashed(asdict(self), 64)

    @property
    def metrics(self) -> list[str]:
        """Names of the history, in order of appearance."""
        return list(dict.fromkeys(name for row in self.history for name in row if name != STEP))


# ------------------------------------------------------------------------------------------------ what is said


def publication(folder: Path, run: Run) -> Publication:
    """Everything that the files of a run with a frozen config say. Raises ReportError or ValueError where one is damaged."""
    grouping = grouped(run)
    tags = (grouping["arm"], grouping["loophole"], run.role, *["uses_oracle"] * run.uses_oracle)
    config = grouping | {"settings": settings(run.config), "meaning": METRICS}
    return Publication(run.name, folder.resolve().parent.parent.name, tuple(dict.fromkeys(tags)), config, tuple(history(folder, run)),
                       tuple(Record(folder / "rollouts.jsonl").rows()), summary(run), run.finished)


def grouped(run: Run) -> dict[str, Any]:
    """Flat keys to group and filter by. What a run does not have is absent."""
    config, source = run.config, run.config["mask_source"]
    recall = {"recall": source["recall"]} if "recall" in source else {}
    cause = {"cause": run.cause} if run.collapsed else {}  # of a failure it may name places on this machine
    names = {group: config[group]["name"] for group in GROUPED}
    return ({"arm": config["arm_name"], "role": run.role, "control": run.control or "none", "seed": config["seed"]} | names | recall
            | {"held_out": ",".join(config["loophole"]["held_out"]) or "none", "pays": config["loophole"]["pays"],
               "uses_oracle": run.uses_oracle, "imitation": names["extra_rollouts"] == "teacher", "recipe": hashed(recipe(config)),
               "code": run.code, "status": run.status} | cause)


def settings(node: Any) -> Any:
    """The frozen config without places: of a file that it names, the name alone. A list of words is one word, so that it groups."""
    if isinstance(node, dict):
        return {key: settings(value) for key, value in node.items() if key not in PLACES}
    if isinstance(node, list):
        words = [settings(value) for value in node]
        return ",".join(words) if words and all(isinstance(word, str) for word in words) else words
    return Path(node).name if isinstance(node, str) and Path(node).is_absolute() else node


def history(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Metrics, audit and evaluations by step."""
    by_step: dict[int, dict] = {}
    for row in (*run.metrics, *run.audit):
        by_step.setdefault(row["step"], {}).update({name: value for name, value in row.items() if name != "step"})
    for step, state, rates in evaluations(folder, run):
        by_step.setdefault(step, {}).update({f"eval/{state}/{name}": rate for name, rate in rates.items()})
    return [{STEP: step} | {name: value for name, value in row.items() if value is not None} for step, row in sorted(by_step.items())]


def evaluations(folder: Path, run: Run) -> list[tuple[int, str, dict[str, float | None]]]:
    """(steps trained, state, rates) of the base, of the deployed policy on the way, and of both policies at the end."""
    found = [(0 if state == BASE else run.steps, state, run.evaluations[state].rates) for state in STATES if state in run.evaluations]
    for file in sorted((folder / "eval").glob(f"step-*-{DEPLOYED}.json")):
        found.append((int(file.stem.split("-")[1]), DEPLOYED, read_json(file)["rates"]))
    return found


def summary(run: Run) -> dict[str, Any]:
    """How the run ended: rates of the evaluations, and means over the last training steps."""
    ends = {f"eval/{state}/{name}": rate for state in STATES if state in run.evaluations
            for name, rate in run.evaluations[state].rates.items()}
    ends |= {f"last{LAST}_{name}": run.last(name) for name in ("hack", "solve")} | {"steps": run.steps}
    return {name: value for name, value in ends.items() if value is not None}


# ------------------------------------------------------------------------------------------------ saying it


def hashed(value: Any, length: int = 8) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def published(folder: Path, publication: Publication, target: Target) -> bool:
    """Whether this very publication went to this very place before."""
    return read_json(folder / RECEIPT) == receipt(publication, target)


def receipt(publication: Publication, target: Target) -> dict[str, Any]:
    return asdict(target) | {"id": publication.id, "fingerprint": publication.fingerprint}


def publish(folder: Path, publication: Publication, target: Target) -> None:
    """Replay the publication into W&B, in place of what stood under its id, and leave a receipt. Raises whatever W&B raises."""
    import wandb

    with claimed(folder / ".wandb.lock", patience=0):
        shutil.rmtree(folder / "wandb", ignore_errors=True)  # an earlier one: one run, one view
        (folder / "wandb").mkdir()
        run = wandb.init(project=target.project, entity=target.entity, mode=target.mode, dir=str(folder), config=publication.config,
                         id=publication.id, name=publication.name, group=publication.group, job_type=publication.config["arm"],
                         tags=publication.tags, reinit="finish_previous", settings=wandb.Settings(**QUIET))
        complete = False
        try:
            replay(run, publication)
            complete = publication.finished
        finally:
            run.finish(exit_code=0 if complete else 1)
        write_json(folder / RECEIPT, receipt(publication, target))


def replay(run: Any, publication: Publication) -> None:
    """Every row along trainer/step. An evaluation on the way is no end, so W&B must not take the last one for the summary."""
    import wandb

    for name in publication.metrics:
        run.define_metric(name, step_metric=STEP, summary="none" if name.startswith("eval/") else None)
    for row in publication.history:
        run.log(row)
    if publication.completions:
        columns = list(dict.fromkeys(name for row in publication.completions for name in row))
        data = [[row.get(name) for name in columns] for row in publication.completions]  # older rows may lack a column
        run.log({"completions": wandb.Table(columns=columns, data=data)})
    run.summary.update(publication.summary)


def log_in() -> None:
    """Ask W&B once whether it would take anything, before a hundred runs ask. Raises ReportError."""
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise ReportError(f"expected to be logged in to W&B; got: {error}. Set WANDB_API_KEY or run `wandb login`, or "
                          "publish with --mode offline and upload later") from error


def default_entity() -> str:
    """Where W&B puts the runs of who is logged in, if nothing else is said."""
    import wandb

    return wandb.Api().default_entity
