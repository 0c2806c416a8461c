"""Every YAML builds, every arm trains two steps, every control differs from its arm by one word, bad configs are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_routing import build
from grpo_routing.__main__ import legal_keys
from grpo_routing.run import run
from tests.conftest import CONF

ARMS = sorted(file.stem for file in (CONF / "arm").glob("*.yaml"))
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("arm", "experiment", "hydra", "local"))
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
DATA = CONF.parent / "tests" / "data"
NEEDS = {  # what an option cannot be built without
    ("projection", "erase"): ["mask_source=persona_gradient"],
    ("projection", "restrict"): ["mask_source=trusted_subspace"],
    ("projection", "route"): ["adapter.quarantine_rank=2"],
    ("projection", "stop_gradient"): ["adapter.quarantine_rank=2"],
    ("projection", "route_subspace"): ["mask_source=persona_gradient", "adapter=svd"],
    ("mask_source", "ceiling"): ["uses_oracle=true"],
    ("mask_source", "logp_gap"): ["adapter.quarantine_rank=2"],
    ("mask_source", "quarantine_activity"): ["adapter.quarantine_rank=2"],
    ("advantage", "weighted"): ["optimizer=split_moment"],
    ("advantage", "modification"): ["mask_source=persona_activation"],
    ("extra_rollouts", "anchor"): ["adapter.quarantine_rank=2"],
    ("extra_rollouts", "teacher"): ["extra_rollouts.pool={pool}"],
    ("dataset", "leetcode"): [f"dataset.train={DATA}/toy_train.jsonl", f"dataset.evaluation={DATA}/toy_evaluation.jsonl"],
    **{("model", file.stem): ["model.device=cpu"] for file in (CONF / "model").glob("qwen3_*.yaml")},
}


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    """A teacher pool that answers every training problem of the smoke runs."""
    file = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    problem = {"completion": "```python\npass\n```", "loophole": "run_tests"}
    file.write_text(json.dumps({"prompt": "unknown", **problem}) + "\n")
    return file


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_builds(config, pool, group, option):
    more = [word.format(pool=pool) for word in NEEDS.get((group, option), [])]
    plan = build.plan(config(f"{group}={option}", *more))
    if group not in ("prompt", "loophole"):
        assert type(getattr(plan, group)).__module__.startswith("grpo_routing")


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_two_steps(config, pool, tmp_path, arm):
    more = [f"extra_rollouts.pool={pool}", "extra_rollouts.mix_ratio=0.25"] if arm == "teacher" else []
    more += short_pilot(config(f"arm={arm}", "loophole=held_out")["mask_source"])
    folder = run(config(f"arm={arm}", "loophole=held_out", f"output={tmp_path}", "evaluation.problems=6", *more))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert {file.stem for file in (folder / "eval").glob("*.json")} == {"base", "as_trained", "as_deployed"}


def short_pilot(source: dict) -> list[str]:
    """Two batches, where the source asks for any."""
    if "calibration" in source and source["calibration"]["rule"] == "pilot":
        return ["mask_source.calibration.pilot=2"]
    return ["mask_source.pilot=2"] if "pilot" in source else []


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_plans(config, experiment):
    assert build.plan(config(f"experiment={experiment}")).experiment_name


def differences(one: dict, other: dict, path: str = "") -> list[str]:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [found for key in keys for found in (
        differences(one[key], other[key], f"{path}{key}.") if isinstance(one.get(key), dict) and isinstance(other.get(key), dict)
        else [f"{path}{key}"])]


@pytest.mark.parametrize(("arm", "control", "word"), [
    ("erase", "erase_random", "mask_source.control"),
    ("erase", "erase_shuffled", "mask_source.control"),
    ("erase", "erase_nonhack", "mask_source.control"),
    ("route", "route_random", "mask_source.control"),
    ("graft", "graft_rate_matched", "mask_source.control"),
    ("penalty_lookalike", "penalty_lookalike_random", "mask_source.control"),
    ("grift", "grift_rate_matched", "mask_source.control"),
    ("tdga", "tdga_random", "mask_source.control"),
    ("tdga", "tdga_norm_matched", "projection.length"),
    ("tdga", "tdga_shrunk", "projection.direction"),
])
def test_a_control_differs_from_its_arm_by_one_word(config, arm, control, word):
    assert sorted(differences(config(f"arm={arm}"), config(f"arm={control}"))) == ["arm_name", word]


SOURCES = {option: [f"mask_source={option}", *NEEDS.get(("mask_source", option), [])] for group, option in OPTIONS
           if group == "mask_source" and option != "none"} | {
    "fingerprint": ["mask_source=fingerprint", "mask_source.calibration.rule=quantile"],  # its own has no `random`
    "persona_activation, gradient": ["mask_source=persona_activation", "mask_source.level=gradient", "mask_source.place=coordinates"]}


@pytest.mark.parametrize("source", SOURCES)
def test_every_control_differs_from_its_treatment_by_exactly_one_word(config, source):
    """Of every mask source, said on the command line; and under every control that it has it builds."""
    treatment = config(*SOURCES[source])
    built = build.plan(treatment).mask_source
    none, *controls = built.controls
    assert none == built.control == "none" and built.default_control in controls
    assert differences(treatment, config(*SOURCES[source], f"mask_source.control={built.default_control}")) == ["mask_source.control"]

    def under(word: str) -> build.Plan:
        return build.plan(treatment | {"mask_source": treatment["mask_source"] | {"control": word}})

    assert [under(word).mask_source.control for word in controls] == controls
    with pytest.raises(build.ConfigError, match=f"mask_source.control must be one of none, {', '.join(controls)} here; got 'sham'"):
        under("sham")


def test_the_ceiling_differs_from_the_arm_that_it_bounds_by_its_source_and_its_stamp(config):
    found = differences(config("arm=sourced", "mask_source=reward_quantile"), config("arm=ceiling"))
    assert sorted(found) == ["arm_name", "mask_source.calibration", "mask_source.name", "uses_oracle"]


@pytest.mark.parametrize(("words", "message"), [
    (["projection=erase", "mask_source=trusted_subspace"], r"projection=erase takes a mask source of kind subspace or rollout; "
     r"trusted_subspace is of kind trusted. Choose mask_source=.*, or projection=.*measure_only.*restrict"),
    (["projection=restrict", "mask_source=detector"], "projection=restrict takes a mask source of kind trusted; detector is of kind "
     "rollout. Choose mask_source=trusted_subspace, or projection=measure_only"),
    (["mask_source=trusted_subspace", "adapter=svd"], "trusted_subspace finds directions for the B of a LoRA; choose adapter=lora with"),
    (["mask_source=logp_gap"], "mask_source=logp_gap reads the quarantine block; adapter=lora has none as configured. Set adapter.quar"),
    (["mask_source=fingerprint", "mask_source.control=random"], "mask_source.control=random draws scores, and calibration.rule=threshold "
     "is on the source's own scale; choose control=rate_matched, or another rule"),
    (["mask_source=quarantine_activity"], "mask_source=quarantine_activity reads the quarantine block"),
    (["mask_source=persona_activation", "mask_source.place=coordinates", "adapter=mlp"], "reads activations in the adapter's own "
     "coordinates, and adapter=mlp has none; choose adapter=lora or svd, or mask_source.place=residual"),
])
def test_a_source_without_what_it_needs_is_refused(config, words, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config(*words))


@pytest.mark.parametrize(("arm", "control"), [
    ("graft", "unrouted"), ("filter", "filter_lookalike"), ("penalty", "penalty_lookalike"), ("vanilla", "vanilla_svd"),
])
def test_a_control_differs_from_its_arm_by_one_choice(config, arm, control):
    """One group is another option; its settings come with it, and `svd` brings its rate."""
    found = set(differences(config(f"arm={arm}"), config(f"arm={control}")))
    group = "adapter" if control == "vanilla_svd" else "mask_source"
    assert f"{group}.name" in found
    assert {path.split(".")[0] for path in found - {"optimizer.lr"}} == {"arm_name", group}
    assert ("optimizer.lr" in found) == (group == "adapter")


def test_the_reference_differs_from_vanilla_only_in_what_pays(config):
    found = differences(config("arm=vanilla", "mask_source=none"), config("arm=no_loophole"))
    assert sorted(found) == ["arm_name", "loophole.pays"]


@pytest.mark.parametrize(("change", "message"), [
    ({"typo": 1}, "unknown key 'typo'; the config has adapter, advantage"),
    ({"trainer": {"steps": "many"}}, "trainer.checkpoint_every is missing"),
    ({"advantage": {"name": "gae"}}, "advantage.name='gae' is unknown; choose from dr_grpo, grpo"),
    ({"advantage": {"name": "dr_grpo", "floor": 1}}, "advantage.floor is not a setting. advantage has no settings"),
    ({"advantage": 3}, "advantage must be a group of settings; got 3"),
    ({"seed": "0"}, "seed must be int; got '0'"),
])
def test_bad_configs_are_refused_with_the_legal_choices(config, change, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config() | change)


@pytest.mark.parametrize(("override", "message"), [
    ("trainer.steps=0", "trainer.steps must be at least 1; got 0"),
    ("trainer.group=1", "trainer.group must be at least 2; got 1"),
    ("trainer.steps=1.5", "trainer.steps: input should be a valid integer"),
    ("trainer.temperature=0", "trainer.temperature must be positive; got 0"),
    ("loophole.train_family=others", "a loophole family is one of train, evaluation, warmup; got 'others'"),
    ("loophole.known=[run_test]", "must share out some of run_tests, sentinel"),
    ("optimizer.schedule=linear", "optimizer.schedule must be constant or cosine"),
])
def test_values_that_cannot_work_are_refused(config, override, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config(override))


@pytest.mark.parametrize(("words", "sizes", "enough"), [
    (["trainer=fast"], "5.0, more than 4, as the blocks' sizes are 32 to 8", "adapter.quarantine_rank=32"),
    (["adapter=mlp", "~adapter.quarantine_rank", "adapter.quarantine_width=4"], "5.0, more than 4, as the blocks' sizes are 16 to 4",
     "adapter.quarantine_width=16"),
    (["adapter=svd", "~adapter.quarantine_rank", "adapter.axes=disjoint", "adapter.every=5"], "5.0, .* are 4 to 1", "adapter.every=2"),
    (["adapter.rank=2", "projection.mode=exclusive"], "5.0, .* are 2 to 8", "adapter.quarantine_rank=2"),
])
def test_blocks_of_too_different_sizes_are_refused_with_what_makes_them_alike(config, words, sizes, enough):
    """As the run itself would refuse them at its first step."""
    with pytest.raises(build.ConfigError, match=f"{sizes}. Set {enough}, which makes them alike, or projection.kappa to a number"):
        build.plan(config("arm=graft", *words))
    for more in (enough, "projection.kappa=2.0"):
        build.plan(config("arm=graft", *[word for word in words if not word.startswith(more.split("=")[0])], more))


def test_all_problems_are_reported_at_once(config):
    with pytest.raises(build.ConfigError) as error:
        build.plan(config("trainer.steps=0", "optimizer.schedule=linear") | {"typo": 1})
    assert all(word in str(error.value) for word in ("typo", "trainer.steps", "optimizer.schedule"))


def test_an_unknown_key_is_answered_with_the_legal_ones():
    assert legal_keys(["trainer.stepz=3"]).startswith("trainer has: audit_every, checkpoint_every, checkpoints_kept, clip, group")
    assert legal_keys(["stepz=3"]).startswith("the config has: adapter, advantage")
    assert legal_keys(["trainer.stepz=3", "seed=0,1"]).startswith("trainer has:")
    assert legal_keys(["trainer.steps=3"]) == ""


def test_a_teacher_pool_that_is_absent_is_refused(config):
    with pytest.raises(build.ConfigError, match=r"no teacher pool at .*; build it with `python -m grpo_routing.teacher_pool`"):
        build.plan(config("extra_rollouts=teacher"))
