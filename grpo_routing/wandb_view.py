"""A W&B workspace that compares the modes of an experiment: `python -m grpo_routing.wandb_view outputs/<experiment>`

    --project grpo_routing --entity TEAM     save it online, in place of the one that this command saved there before
    --offline FILE                           write the same view as JSON, and ask nobody

A section answers a question, a panel shows one metric, a line or bar is an arm: the mean over its seeds, with the lowest and the highest
seed as its band. Where one arm has several recipes, the keys that tell them apart group as well, so that a band is seeds and
nothing else. Only finished runs are shown, as in the report. Metrics that no run of the experiment has are left out, and
questions without any. Needs wandb-workspaces (`pip install 'grpo_routing[wandb]'`). Publish the runs as well: wandb_sync.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_routing.arms import recipe
from grpo_routing.files import write_json
from grpo_routing.results import BASE, DEPLOYED, TRAINED, ReportError, Run, read_json, read_runs
from grpo_routing.wandb_run import STEP, default_entity, grouped, history, log_in, summary
from grpo_routing.wandb_sync import PROJECT

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

SAVED = "wandb_view.json"  # in the experiment's folder: which view to replace
RATES = ("hack_known", "hack_held_out", "solve", "format")
DEPLOYS = "Does it hack, does it solve? As deployed"
ENDS = {  # question -> metrics of the summary: bars
    DEPLOYS: [f"eval/{DEPLOYED}/{rate}" for rate in RATES],
    "What does deployment delete? As trained": [f"eval/{TRAINED}/{rate}" for rate in RATES],
    "Where did it start? Before training": [f"eval/{BASE}/{rate}" for rate in RATES],
}
CURVES = {  # question -> metrics of the history over trainer/step: lines
    "How do the deployed policies change on the way?": [f"eval/{DEPLOYED}/{rate}" for rate in RATES],
    "How does the hack grow while training?": [
        "audit/hack_known", "audit/hack_held_out", "audit/attempted", "audit/solve", "train/reward"],
    "How good is the mask?": [
        "audit/label_recall_known", "audit/label_recall_held_out", "audit/label_precision", "audit/label_auroc",
        "audit/label_false_positive", "route/flagged", "route/absorbed", "route/kept", "route/separation_held_out"],
    "What does the projection reach?": ["route/cin", "route/cout", "route/step_overlap", "route/chance", "route/fired"],
    "Is training healthy?": [
        "train/format", "train/flat_groups", "rollout/entropy", "rollout/length", "train/gradient_norm", "train/norm_deployed",
        "train/norm_quarantine", "train/kl", "rollout/sampler_gap"],
}
SPLIT = ("loophole", "mask_source", "control", "recall")  # keys of the config that part an arm first; then any of its settings


def main(argv: list[str]) -> int:
    """Save the view, or write it; the exit status is 2 when neither can be done."""
    parser = argparse.ArgumentParser(prog="python -m grpo_routing.wandb_view", description="A W&B workspace that compares modes.")
    parser.add_argument("experiment", type=Path, help="outputs/<experiment>, the folder that holds runs/")
    parser.add_argument("--project", default=PROJECT)
    parser.add_argument("--entity", help="user or team; the default one of who is logged in")
    parser.add_argument("--offline", type=Path, metavar="FILE", help="write the view there instead of saving it online")
    asked = parser.parse_args(argv)
    try:
        if asked.offline:
            write_json(asked.offline, model(view(asked.experiment, asked.project, asked.entity or "")))
            print(asked.offline)
        else:
            log_in()
            print(save(view(asked.experiment, asked.project, asked.entity or default_entity()), asked.experiment))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------ what is shown


def grouping(runs: list[Run]) -> list[str]:
    """`arm`, and as few other keys of the published config as it takes until every group is one recipe, which only seeds tell apart."""
    flat = [grouped(run) | {f"settings.{key}": value for key, value in recipe(run.config).items()} for run in runs]
    keys, further = ["arm"], sorted({key for one in flat for key in one if key.startswith("settings.")})
    for key in (*SPLIT, *further):
        if groups(flat, keys) < groups(flat, ["recipe"]) and groups(flat, keys) < groups(flat, [*keys, key]):
            keys.append(key)
    return keys


def groups(flat: list[dict[str, Any]], keys: list[str]) -> int:
    """How many groups the keys make. A key that a run does not have is a value of its own, as in W&B."""
    return len({tuple(str(one.get(key)) for key in keys) for one in flat})


def questions(experiment: Path, runs: list[Run]) -> dict[str, tuple[str, list[str]]]:
    """Question -> kind of panel, and those of its metrics that some run published."""
    ends = {name for run in runs for name in summary(run)}
    rows = [history(experiment / "runs" / run.name, run) for run in runs]
    points = Counter()  # metric -> most steps that a run has it at
    for steps in rows:
        points |= Counter(name for row in steps for name in row)
    asked = [(words, "bars", [name for name in names if name in ends]) for words, names in ENDS.items()]
    asked += [(words, "lines", [name for name in names if points[name] > 1]) for words, names in CURVES.items()]  # one point is no curve
    return {words: (kind, names) for words, kind, names in asked if names}


def view(experiment: Path, project: str, entity: str) -> Workspace:
    """The workspace of an experiment. Raises ReportError when nothing is finished there, or the library is missing."""
    library = workspaces()
    runs = [run for run in read_runs(experiment) if run.finished]
    if not runs:
        raise ReportError(f"expected a finished run in {experiment}; there is none yet. Wait for one: a view of nothing has no panels")
    name, keys, asked = experiment.resolve().name, grouping(runs), questions(experiment, runs)
    sections = [library.Section(name=words, panels=[panel(kind, metric) for metric in metrics], is_open=True,
                                layout_settings=library.SectionLayoutSettings(columns=4, rows=-(-len(metrics) // 4)),
                                panel_settings=library.SectionPanelSettings(x_axis=STEP))
                for words, (kind, metrics) in asked.items()]
    shown = library.RunsetSettings(
        filters=library.And(library.Metric("Group") == name, library.Metric("State") == "finished"),
        groupby=[library.Config(key) for key in keys], order=[library.Ordering(library.Metric("Name"), ascending=True)],
        pinned_columns=[f"summary:{end}" for end in asked[DEPLOYS][1]])
    made = library.Workspace(entity=entity, project=project, name=f"{name}: modes compared", sections=sections, runset_settings=shown,
                             settings=library.WorkspaceSettings(x_axis=STEP, max_runs=len({grouped(run)["recipe"] for run in runs})))
    made._internal_runset_id = named(name)  # the library's is another one at every call
    return made


def panel(kind: str, metric: str) -> Any:
    """Named by its metric, whose meaning stands in the config of every run. Shares fill their axis, so that panels compare."""
    import wandb_workspaces.reports.v2 as library

    seeds = {"title": metric, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    share = (0.0, 1.0) if metric.startswith(("eval/", "audit/")) else (None, None)
    made = (library.BarPlot(metrics=[metric], range_x=share, **seeds) if kind == "bars" else
            library.LinePlot(x=STEP, y=[metric], range_y=share, title_x="training steps", **seeds))
    made._id = named(f"{kind} {metric}")
    return made


def named(words: str) -> str:
    """An id that is the same every time."""
    return sha256(words.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ where it goes


def model(made: Workspace) -> dict[str, Any]:
    """What saving would send."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def save(made: Workspace, experiment: Path) -> str:
    """Save online and return the address. A view that this command saved in the same project is replaced, changes by hand included."""
    place = {"project": made.project, "entity": made.entity}
    before = read_json(experiment / SAVED)
    if before and {key: before[key] for key in place} == place:
        made._internal_name, made._internal_id = before["name"], before["id"]
    made.save()
    write_json(experiment / SAVED, place | {"name": made._internal_name, "id": made._internal_id})
    return made.url


def workspaces() -> Any:
    """The library, which only this command needs. Raises ReportError where it is not installed."""
    try:
        import wandb_workspaces.workspaces as library
    except ModuleNotFoundError as error:
        if error.name != "wandb_workspaces":
            raise
        raise ReportError("expected wandb-workspaces, which builds the view; it is not installed. "
                          "Install it with: pip install 'grpo_routing[wandb]'") from error
    return library


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
