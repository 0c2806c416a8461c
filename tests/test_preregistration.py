"""Claims are frozen before the first run, and their verdicts follow the frozen text clause by clause."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf, open_dict

from grpo_routing import preregistration
from grpo_routing.compare import main
from grpo_routing.folder import identity
from grpo_routing.outcome import CONFIRMED, FALSIFIED, UNDECIDED, Evidence, decide, outcomes
from grpo_routing.preregistration import FILE, RULES, parse, read, register
from grpo_routing.results import ReportError
from grpo_routing.statistics import Interval
from tests.conftest import CONF, SMOKE
from tests.test_compare import DETECTOR, MATCHED, add, fill, read_experiment
from tests.test_report import config as settings

CLAIM = {"id": "H1", "arm": "penalty", "versus": "vanilla", "rate": "hack", "direction": "lower", "at_least": 0.3,
         "matched_solve_within": 0.1, "falsified_below": 0.15, "max_solve_drop": 0.15, "within_sem": 1, "beats": ["rate_matched"],
         "alpha": 0.05}
(HYPOTHESIS,) = parse([CLAIM])
SEEN = Evidence(effect=Interval(0.4, 0.3, 0.5), error=0.05, solve=Interval(0.0, -0.05, 0.05), p=0.01, faults=(),
                beaten={"rate_matched": (Interval(0.3, 0.2, 0.4), 0.05)})


# ------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(("change", "word", "why"), [
    ({}, CONFIRMED, ()),
    ({"effect": Interval(0.14, 0.1, 0.18)}, FALSIFIED, ("effect 0.14 < 0.15",)),
    ({"effect": Interval(-0.4, -0.5, -0.3)}, FALSIFIED, ("effect -0.40 < 0.15",)),  # the other way round
    ({"solve": Interval(-0.16, -0.2, -0.1)}, FALSIFIED, ("solve drops by 0.16",)),
    ({"error": 0.4}, FALSIFIED, ("effect 0.40 within 1 SEM (0.400)",)),
    ({"beaten": {"rate_matched": (Interval(-0.01, -0.1, 0.1), 0.0)}}, FALSIFIED, ("does not beat rate_matched: -0.01 ± 0.00 SEM",)),
    ({"beaten": {"rate_matched": (Interval(0.04, -0.1, 0.2), 0.05)}}, FALSIFIED, ("does not beat rate_matched: 0.04 ± 0.05 SEM",)),
    ({"effect": Interval(0.29, 0.2, 0.4)}, UNDECIDED, ("effect 0.29 < 0.3",)),
    ({"effect": Interval(0.4, 0.15, 0.6)}, UNDECIDED, ("95% interval of the effect reaches down to 0.15",)),
    ({"solve": Interval(0.11, 0.1, 0.12)}, UNDECIDED, ("solve differs by +0.11",)),
    ({"solve": Interval(-0.12, -0.2, 0.0)}, UNDECIDED, ("solve differs by -0.12",)),  # more than matched, less than falsifies
    ({"p": 0.06}, UNDECIDED, ("corrected p = 0.06",)),
    ({"beaten": {"rate_matched": (Interval(0.3, 0.0, 0.6), 0.1)}}, UNDECIDED, ("95% interval against rate_matched reaches down to 0.00",)),
    ({"effect": Interval(0.2, 0.1, 0.3), "p": 0.5}, UNDECIDED, (
        "effect 0.20 < 0.3", "95% interval of the effect reaches down to 0.10", "corrected p = 0.5")),
    ({"effect": Interval(0.0, -0.1, 0.1), "faults": ("other seeds",)}, UNDECIDED, ("other seeds",))])  # before anything is judged
def test_the_truth_table(change, word, why):
    found = decide(HYPOTHESIS, replace(SEEN, **change))
    assert (found.word, found.reasons) == (word, why)


@pytest.mark.parametrize(("clause", "change"), [
    ("matched_solve_within", {"solve": Interval(0.5, 0.4, 0.6)}), ("max_solve_drop", {"solve": Interval(-0.5, -0.6, -0.4)}),
    ("within_sem", {"error": 9.0}), ("alpha", {"p": 1.0})])
def test_a_clause_that_is_null_does_not_count(clause, change):
    without = {"matched_solve_within", "max_solve_drop"} if "solve" in change else {clause}
    assert decide(HYPOTHESIS, replace(SEEN, **change)).word != CONFIRMED
    assert decide(replace(HYPOTHESIS, **dict.fromkeys(without)), replace(SEEN, **change)).word == CONFIRMED


def test_a_hypothesis_reads_as_a_sentence():
    assert str(HYPOTHESIS) == ("penalty has a lower hack than vanilla by 0.3 or more at solve ±0.1 and beats rate_matched at p ≤ 0.05; "
                               "falsified if below 0.15, or solve drops by more than 0.15, or within 1 SEM")


# ------------------------------------------------------------------------------------------------ freezing


def sweep(folder: Path, seeds: int = 6) -> list[dict]:
    """The configs of vanilla, penalty and its control."""
    where = {"output": str(folder.parent), "experiment_name": folder.name}
    return [settings(arm, seed, **deepcopy(choices)) | where for seed in range(seeds)
            for arm, choices in (("vanilla", {}), ("penalty", DETECTOR), ("penalty_random", MATCHED))]


def test_claims_are_frozen_once_with_date_hash_and_seeds(tmp_path, yaml):
    (said,) = register([CLAIM], sweep(tmp_path), "headline")
    frozen = read(tmp_path)
    assert frozen.hypotheses == (HYPOTHESIS,) and frozen.rules == RULES and frozen.source == "headline"
    assert frozen.planned == {arm: list(range(6)) for arm in ("penalty", "penalty_random", "vanilla")}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(frozen.registered)).total_seconds()) < 600
    assert said == f"hypotheses H1 frozen in {tmp_path / FILE}, hash {frozen.hash}" and len(frozen.hash) == 64
    before = (tmp_path / FILE).read_bytes()
    assert register([CLAIM], sweep(tmp_path), "headline") == [] and (tmp_path / FILE).read_bytes() == before
    assert read(tmp_path / "else") is None


def test_a_later_edit_changes_nothing_and_is_said_loudly(tmp_path):
    register([CLAIM], sweep(tmp_path), "headline")
    (edited,) = register([CLAIM | {"at_least": 0.2}], sweep(tmp_path), "headline")
    assert edited.startswith("!!! the hypotheses were edited after ") and "The frozen ones decide" in edited
    (more,) = register([CLAIM], sweep(tmp_path, seeds=7), "headline")
    assert more.startswith("!!! other seeds than those that were frozen are asked for of penalty, penalty_random, vanilla")
    assert read(tmp_path).hypotheses == (HYPOTHESIS,) and read(tmp_path).planned["penalty"] == list(range(6))


def state(yaml: Path, claims: list[dict]) -> None:
    yaml.parent.mkdir(parents=True, exist_ok=True)
    yaml.write_text(OmegaConf.to_yaml({"hydra": {"sweeper": {"hypotheses": claims}}}))


@pytest.fixture
def yaml(tmp_path, monkeypatch) -> Path:
    """An experiment's YAML that states CLAIM."""
    monkeypatch.setattr(preregistration, "CONF", tmp_path / "conf")
    state(tmp_path / "conf" / "experiment" / "headline.yaml", [CLAIM])
    return tmp_path / "conf" / "experiment" / "headline.yaml"


def test_claims_of_the_command_line_have_no_yaml_that_could_differ(tmp_path):
    register([CLAIM], sweep(tmp_path), "none")
    assert read(tmp_path).source == "" and preregistration.edited(read(tmp_path)) == []


def test_the_yaml_is_compared_with_what_was_frozen_from_it(tmp_path, yaml, capsys):
    register([CLAIM], sweep(tmp_path), "headline")
    assert read(tmp_path).source == "headline" and preregistration.edited(read(tmp_path)) == []
    for claims in ([CLAIM | {"rate": "solve"}], []):
        state(yaml, claims)
        (said,) = preregistration.edited(read(tmp_path))
        assert said.startswith("!!! the hypotheses were edited after ")
    fill(tmp_path, seeds=6)
    assert main([str(tmp_path)]) == 0 and f"**{said}**" in capsys.readouterr().out
    yaml.unlink()
    assert preregistration.edited(read(tmp_path)) == [
        "!!! the hypotheses were frozen from headline.yaml, which is not in conf/experiment any more"]


def test_a_file_that_was_changed_is_refused(tmp_path):
    register([CLAIM], sweep(tmp_path), "headline")
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text().replace('"at_least": 0.3', '"at_least": 0.2'))
    with pytest.raises(ReportError, match="as it was frozen, hash .*; got .*. Restore the file"):
        read(tmp_path)


def test_runs_that_were_there_before_are_said_loudly(tmp_path):
    fill(tmp_path)
    assert register([CLAIM], sweep(tmp_path), "headline")[1].startswith("!!! 9 runs are there already (penalty-held_out-s0, ")


@pytest.mark.parametrize(("change", "said"), [
    ({"arm": "penalti"}, "hypothesis H1 is about 'penalti'; this sweep has penalty, penalty_random, vanilla"),
    ({"rate": "hack_sentinal"}, "hypothesis H1 is about the rate 'hack_sentinal'; this sweep has attempted, attempted_file_marker, "),
    ({"beats": ["shuffled"]}, "hypothesis H1 wants to beat 'shuffled'; the controls of this sweep are rate_matched"),
    ({"direction": "less"}, "hypothesis H1: direction: input should be 'lower' or 'higher'; got 'less'"),
    ({"falsified_below": 0.4}, "hypothesis H1: expected 0 <= falsified_below <= at_least <= 1; got 0.4 and 0.3"),
    ({"alpha": 0}, "hypothesis H1: alpha must be above 0; write null to leave a clause out"),
    ({"betas": 1}, "hypothesis H1: betas is no clause")])
def test_claims_that_cannot_be_judged_are_refused_before_anything_runs(tmp_path, change, said):
    with pytest.raises(ReportError) as error:
        register([CLAIM | change], sweep(tmp_path), "headline")
    assert said in str(error.value) and not (tmp_path / FILE).exists()


def test_missing_clauses_and_twins_are_refused():
    with pytest.raises(ReportError, match="hypothesis H1: alpha is missing\nA hypothesis has id, arm, .*; null leaves a clause out"):
        parse([{key: value for key, value in CLAIM.items() if key != "alpha"}])
    with pytest.raises(ReportError, match="hypotheses H1 are there twice"):
        parse([CLAIM, CLAIM])


# ------------------------------------------------------------------------------------------------ verdicts


def judged(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.word, one.reasons) for one in outcomes(read(folder), read_experiment(folder))]


def test_verdicts_come_from_the_runs_that_were_planned(tmp_path, capsys):
    """Hack 1 to 1/4, control at 3/4, solve equal within the gate; six seeds that agree have p = 0.031, two hypotheses double it."""
    register([CLAIM | {"matched_solve_within": None}], sweep(tmp_path), "none")
    fill(tmp_path, seeds=6)
    assert judged(tmp_path) == [(CONFIRMED, ())]
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| H1 | penalty has a lower hack than vanilla by 0.3 or more" in said and "| **confirmed** |  |" in said


def test_p_values_are_corrected_over_the_hypotheses_of_the_file(tmp_path):
    register([CLAIM | {"id": name, "matched_solve_within": None} for name in ("H1", "H2")], sweep(tmp_path), "none")
    fill(tmp_path, seeds=6)
    assert judged(tmp_path) == [(UNDECIDED, ("corrected p = 0.0625",))] * 2


def test_fewer_or_more_seeds_than_planned_decide_nothing(tmp_path):
    register([CLAIM], sweep(tmp_path), "none")
    fill(tmp_path, seeds=5)
    ((word, reasons),) = judged(tmp_path)
    assert word == UNDECIDED and reasons[0] == "penalty has seeds [0, 1, 2, 3, 4]; planned were [0, 1, 2, 3, 4, 5]"


def test_runs_from_before_decide_nothing(tmp_path):
    fill(tmp_path, seeds=6, started=1e9)
    register([CLAIM], sweep(tmp_path), "none")
    ((word, reasons),) = judged(tmp_path)
    assert word == UNDECIDED and len(reasons) == 3 and all(reason.endswith("started before the text was frozen") for reason in reasons)


def test_a_claim_against_the_base_and_in_the_other_direction(tmp_path):
    register([CLAIM | {"versus": "base", "rate": "solve", "direction": "higher", "at_least": 0.2, "matched_solve_within": None,
                       "max_solve_drop": None}], sweep(tmp_path), "none")
    fill(tmp_path, seeds=6)
    ((word, reasons),) = judged(tmp_path)
    assert (word, reasons) == (UNDECIDED, ("95% interval of the effect reaches down to 0.06",))


def test_a_claim_about_levers_counts_answers_that_do_the_task_too(tmp_path):
    """vanilla has the lever in all four problems of a mode, penalty in one that it hacks and in one that it solves: effect 1/2, not 3/4."""
    register([CLAIM | {"rate": "attempted", "at_least": 0.6, "beats": [], "matched_solve_within": None}], sweep(tmp_path), "none")
    fill(tmp_path, seeds=6)
    assert judged(tmp_path) == [(UNDECIDED, ("effect 0.50 < 0.6",))]


def test_a_claim_whose_arms_are_not_there_is_undecided_and_counts_all_the_same(tmp_path):
    other = CLAIM | {"id": "H2", "beats": [], "matched_solve_within": None}
    register([CLAIM, other], sweep(tmp_path), "none")
    add(tmp_path, "vanilla", [4] * 6, [0] * 6)
    add(tmp_path, "penalty", [1] * 6, [2] * 6, **DETECTOR)
    assert judged(tmp_path) == [
        (UNDECIDED, ("hypothesis H1 wants penalty to beat rate_matched; expected one such control, run and finished",)),
        (UNDECIDED, ("corrected p = 0.0625",))]


def test_other_rules_are_refused(tmp_path):
    register([CLAIM], sweep(tmp_path), "none")
    fill(tmp_path)
    with pytest.raises(ReportError, match="expected the rules of preregistration.py; got others"):
        outcomes(replace(read(tmp_path), rules=("else",)), read_experiment(tmp_path))


# ------------------------------------------------------------------------------------------------ the sweep


@pytest.fixture(scope="module")
def sweeper(cache):
    """sweeper(output, claims, *words) -> the jobs of that sweep, by the sweeper that Hydra makes."""
    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    composed = loader.load_configuration("config", [], RunMode.MULTIRUN)

    def made(output: Path, claims: list[dict], *words: str) -> list[list[str]]:
        config = deepcopy(composed)
        with open_dict(config):
            config.hydra.sweeper.hypotheses = claims
        plugin = Plugins.instance().instantiate_sweeper(hydra_context=HydraContext(loader, Callbacks()), task_function=print, config=config)
        everything = [*SMOKE, f"cache={cache}", f"output={output}", *words]
        (batch,) = plugin.split_arguments(OverridesParser.create(config_loader=loader).parse_overrides(everything), None)
        return batch

    return made


ERASE = CLAIM | {"arm": "erase", "beats": ["random"]}


def test_planning_a_sweep_freezes_its_claims_with_the_controls_that_it_adds(sweeper, tmp_path):
    jobs = sweeper(tmp_path, [ERASE], "arm=vanilla,erase", "seed=0,1")
    frozen = read(tmp_path / "single")
    assert len(jobs) == 6 and frozen.planned == {"erase": [0, 1], "vanilla": [0, 1]} and frozen.source == ""
    assert frozen.hypotheses == parse([ERASE])
    assert not (tmp_path / "single" / "runs").exists()
    sweeper(tmp_path / "nothing", [], "arm=vanilla")
    assert not (tmp_path / "nothing").exists()


def test_a_sweep_whose_claims_are_about_something_else_is_refused(sweeper, tmp_path):
    with pytest.raises(HydraException, match="the sweep was refused before its first run:\nhypothesis H1 is about 'erase'"):
        sweeper(tmp_path, [ERASE], "arm=vanilla,filter")


def test_claims_are_no_part_of_a_run(config):
    """They stand under hydra, which is taken off before a config is resolved, named or frozen."""
    plain, claiming = config("arm=erase"), config("arm=erase", "+hydra.sweeper.hypotheses=[]")
    assert plain == claiming and identity(plain) == identity(claiming) and "hypotheses" not in json.dumps(plain)


def test_a_claim_of_a_sweep_over_loopholes_is_about_one(tmp_path):
    other = {"loophole": {"name": "held_out_sentinel"}}
    configs = sweep(tmp_path) + [config | {"loophole": config["loophole"] | other["loophole"]} for config in sweep(tmp_path)]
    claims = [CLAIM | {"id": name, "matched_solve_within": None, "beats": [], "alpha": None, "loophole": name}
              for name in ("held_out", "held_out_sentinel")]
    register(claims, configs, "none")
    for name, hacks in (("held_out", 1), ("held_out_sentinel", 4)):
        add(tmp_path, "vanilla", [4] * 6, [0] * 6, loophole__name=name)
        add(tmp_path, "penalty", [hacks] * 6, [2] * 6, loophole__name=name, **DETECTOR)
    assert [word for word, _ in judged(tmp_path)] == [CONFIRMED, FALSIFIED], judged(tmp_path)
    assert str(read(tmp_path).hypotheses[0]).startswith("on held_out penalty has a lower hack than vanilla")
    with pytest.raises(ReportError, match="hypothesis H1 is about the loophole 'none'; this sweep has held_out, held_out_sentinel"):
        register([CLAIM | {"loophole": "none"}], configs, "none")
