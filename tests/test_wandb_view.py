"""The W&B view of an experiment: what it shows was published, a group is seeds and nothing else, and saving sends what the file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_routing import wandb_sync, wandb_view
from grpo_routing.log import METRICS
from grpo_routing.results import read_runs
from grpo_routing.run import run
from grpo_routing.wandb_run import publication
from tests.wandb_files import told, write_run
from tests.wandb_server import stand_in

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["loophole=held_out", "trainer.steps=4"]


def made(experiment: Path, *words: str) -> dict:
    """The view as the command writes it."""
    file = experiment.parent / "view.json"
    assert wandb_view.main([str(experiment), "--offline", str(file), *words]) == 0
    return json.loads(file.read_text())


def sections(view: dict) -> dict[str, list[dict]]:
    return {one["name"]: one["panels"] for one in view["spec"]["section"]["panelBankConfig"]["sections"]}


def runset(view: dict) -> dict:
    (found,) = view["spec"]["section"]["runSets"]
    return found


def grouping(view: dict) -> list[str]:
    return [key["name"].replace(".value", "", 1) for key in runset(view)["grouping"]]


def value(config: dict, key: str):
    """Of a dotted key; None where a run does not have it, which W&B takes for a group of its own."""
    for name in key.split("."):
        config = config.get(name)
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    """An experiment of one real run, evaluated on the way, published offline."""
    output = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp("wandb")))
        run(config("arm=graft", "loophole=held_out", "mask_source.false_positive=0.5", "evaluation.every=1", f"output={output}",
                   "experiment_name=modes"))
        assert wandb_sync.main([str(output / "modes"), "--mode", "offline"]) == 0
    return output / "modes"


# ------------------------------------------------------------------------------------------------ what it shows was published


def test_every_metric_of_the_view_is_in_what_was_published(trained):
    (folder,) = (trained / "runs").iterdir()
    said, view = told(folder), made(trained)
    kinds = {"Bar Chart": set(said.summary), "Run History Line Plot": {name for row in said.history for name in row}}
    panels = [panel for own in sections(view).values() for panel in own]
    for panel in panels:
        assert set(panel["config"]["metrics"]) <= kinds[panel["viewType"]], panel["config"]["chartTitle"]
    assert {panel["config"]["xAxis"] for panel in panels if panel["viewType"] != "Bar Chart"} == {"trainer/step"}
    assert len(panels) > 25
    assert {key.removeprefix("summary:") for key in runset(view)["runFeed"]["columnOrder"]} - {"run:displayName"} == {
        f"eval/as_deployed/{rate}" for rate in wandb_view.RATES} < set(said.summary)
    for key in grouping(view):
        assert value(said.config, key) == "graft"
    filters = {one["key"]["name"]: (one["op"], one["value"]) for one in runset(view)["filters"]["filters"]}
    assert filters == {"group": ("=", said.start.run_group), "state": ("=", "finished")}
    assert said.kind("exit")[0].exit_code == 0  # which W&B calls finished


def test_a_section_answers_a_question(trained):
    found = {words: [panel["config"]["metrics"] for panel in panels] for words, panels in sections(made(trained)).items()}
    assert list(found) == [*wandb_view.ENDS, *(words for words in wandb_view.CURVES if words != "What does the projection reach?")]
    rates = ["hack_known", "hack_held_out", "solve", "format"]
    assert found["Does it hack, does it solve? As deployed"] == [[f"eval/as_deployed/{rate}"] for rate in rates]
    assert found["How do the deployed policies change on the way?"] == [[f"eval/as_deployed/{rate}"] for rate in rates]
    assert ["audit/label_false_positive"] in found["How good is the mask?"]


def test_a_band_is_the_lowest_and_the_highest_seed_around_their_mean(trained):
    configs = [panel["config"] for panels in sections(made(trained)).values() for panel in panels]
    assert {(one["groupAgg"], one["groupArea"]) for one in configs} == {("mean", "minmax")}
    settings = made(trained)["spec"]["section"]["settings"]
    assert settings["useRunsTableGroupingInPanels"] and settings["maxRuns"] == 1 and settings["xAxis"] == "trainer/step"


def test_every_metric_that_may_be_shown_has_a_meaning():
    named = {name for names in wandb_view.CURVES.values() for name in names if not name.startswith("eval/")}
    assert named <= set(METRICS)


def test_what_no_run_measured_has_no_panel(config, tmp_path):
    write_run(tmp_path / "x", config("arm=vanilla", *WORDS))
    found = {words: [panel["config"]["metrics"][0] for panel in panels] for words, panels in sections(made(tmp_path / "x")).items()}
    ends = {words: [name for name in names if not name.endswith("held_out")] for words, names in wandb_view.ENDS.items()}
    assert found == ends | {
        "How do the deployed policies change on the way?": [f"eval/as_deployed/{rate}" for rate in ("hack_known", "solve", "format")],
        "How does the hack grow while training?": ["audit/solve", "train/reward"], "Is training healthy?": ["train/format"]}
    (folder,) = (tmp_path / "x" / "runs").iterdir()
    (folder / "eval" / "step-000002-as_deployed.json").unlink()
    assert "How do the deployed policies change on the way?" not in sections(made(tmp_path / "x"))  # one point is no curve


# ------------------------------------------------------------------------------------------------ groups


def test_an_arm_of_one_recipe_is_grouped_by_its_name(config, tmp_path):
    for seed in range(3):
        write_run(tmp_path / "x", config("arm=erase", *WORDS, f"seed={seed}"))
        write_run(tmp_path / "x", config("arm=vanilla", *WORDS, f"seed={seed}"))
    view = made(tmp_path / "x")
    assert grouping(view) == ["arm"]
    assert view["spec"]["section"]["settings"]["maxRuns"] == 2


@pytest.mark.parametrize(("other", "keys"), [
    (["mask_source.recall=0.5"], ["arm", "recall"]),
    (["loophole=held_out_sentinel"], ["arm", "loophole"]),
    (["mask_source.control=rate_matched"], ["arm", "control"]),
    (["optimizer.lr=0.25"], ["arm", "settings.optimizer.lr"]),
    (["loophole=held_out_sentinel", "mask_source.recall=0.5"], ["arm", "loophole"]),  # they go together
])
def test_where_recipes_share_an_arm_what_tells_them_apart_groups_as_well(config, tmp_path, other, keys):
    for seed in range(2):
        write_run(tmp_path / "x", config("arm=graft", *WORDS, f"seed={seed}"))
        write_run(tmp_path / "x", config("arm=graft", *WORDS, f"seed={seed}", *other), ending="89abcdef")
        write_run(tmp_path / "x", config("arm=vanilla", *WORDS, f"seed={seed}"))
    view, runs = made(tmp_path / "x"), read_runs(tmp_path / "x")
    assert grouping(view) == keys
    assert view["spec"]["section"]["settings"]["maxRuns"] == 3
    recipes: dict[str, set] = {}  # of each group
    for one in runs:
        config = publication(tmp_path / "x" / "runs" / one.name, one).config
        recipes.setdefault(str([value(config, key) for key in keys]), set()).add(config["recipe"])
    assert list(map(len, recipes.values())) == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ where it goes


def test_the_file_is_the_same_every_time_and_says_where_it_belongs(trained):
    view = made(trained, "--project", "p", "--entity", "e")
    assert (view["project"], view["entity"], view["displayName"]) == ("p", "e", "modes: modes compared")
    file = trained.parent / "again.json"
    words = [str(trained), "--project", "p", "--entity", "e", "--offline", str(file)]
    again = subprocess.run([sys.executable, "-m", "grpo_routing.wandb_view", *words], cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, f"{file}\n", "")
    assert file.read_bytes() == (trained.parent / "view.json").read_bytes()


def test_saving_sends_what_the_file_says_and_the_next_time_replaces_it(trained):
    """To a stand-in for W&B: what is sent, and not what W&B makes of it."""
    with stand_in() as server:
        said = [server.run("wandb_view", str(trained), *words) for words in ((), (), ("--project", "other"))]
        first, second, other = server.variables("UpsertView2")
        assert said[0] == said[1] == f"{server.address}/team/grpo_routing?nw={first['name'].removeprefix('nw-').removesuffix('-v')}\n"
    file = made(trained, "--entity", "team")
    for sent in (first, second):
        assert (sent["projectName"], sent["entityName"], sent["displayName"]) == ("grpo_routing", "team", file["displayName"])
        assert json.loads(sent["spec"]) == file["spec"]
    assert "id" not in first and (second["id"], second["name"]) == ("view-1", first["name"])
    assert "id" not in other and other["name"] != first["name"]


def test_an_experiment_without_a_finished_run_is_refused(config, tmp_path, capsys):
    write_run(tmp_path / "x", config("arm=erase", *WORDS), state="running", done=3)
    assert wandb_view.main([str(tmp_path / "x"), "--offline", str(tmp_path / "view.json")]) == 2
    assert capsys.readouterr().err == (f"expected a finished run in {tmp_path}/x; there is none yet. "
                                       "Wait for one: a view of nothing has no panels\n")
    assert not (tmp_path / "view.json").exists()


def test_without_the_library_the_command_says_how_to_get_it(trained, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert wandb_view.main([str(trained), "--offline", "view.json"]) == 2
    assert capsys.readouterr().err == ("expected wandb-workspaces, which builds the view; it is not installed. "
                                       "Install it with: pip install 'grpo_routing[wandb]'\n")


class Missing:
    """A finder for which wandb-workspaces is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "wandb_workspaces":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
