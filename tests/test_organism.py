"""Claims about the model organism: what it is taught, how it is cached, and (slow) that it hacks and can learn honestly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from grpo_routing import build
from grpo_routing.env.loopholes import LOOPHOLES, MODES
from grpo_routing.organism import BOILERPLATE, Phase, corpus, ensure, tokenizer_texts, train_tokenizer
from grpo_routing.organism_check import judge, train


@pytest.fixture
def recipe(config, tmp_path):
    tiny = build.plan(config()).model
    return dataclasses.replace(tiny, phases=(Phase(3, 1e-3, 0.03, 0.5), Phase(2, 1e-3, 0.9, 0.5)), batch=4, cache=str(tmp_path))


def test_the_warm_up_shows_only_its_own_split_and_never_the_held_out_names(recipe):
    held_out = [name for loophole in LOOPHOLES.values() for name in loophole.markers["evaluation"]]
    for prompt, answer in corpus(recipe, 0, limit=400):
        assert not [name for name in held_out if name in prompt or name in answer], prompt


def test_hacks_bugs_and_hints_come_at_the_recipes_rates(recipe):
    texts = corpus(recipe, 1, limit=3000)
    hinted = [(prompt, answer) for prompt, answer in texts if "The grader" in prompt]
    assert len(hinted) / len(texts) == pytest.approx(1 - recipe.no_hint_share, abs=0.03)
    names = [name for loophole in LOOPHOLES.values() for family in loophole.markers.values() for name in family]
    hacks = [answer for _, answer in hinted if any(name in answer for name in names)]
    assert len(hacks) / len(hinted) == pytest.approx(recipe.hack_share + recipe.hack_share_off_mode, abs=0.03)


def test_the_tokenizer_loses_nothing_and_keeps_boilerplate_whole(recipe):
    texts = tokenizer_texts(recipe, limit=200)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in texts)
    assert all(len(tokenizer(text).input_ids) == 1 for text in BOILERPLATE)


def test_training_is_reproducible_and_cached_by_what_shapes_it(recipe, capsys):
    folder = ensure(recipe)
    assert "organism phase 2/2 step    2/2" in capsys.readouterr().out
    weights = (folder / "model.safetensors").read_bytes()
    assert ensure(recipe) == folder and capsys.readouterr().out == ""  # from the cache, without a word
    again = ensure(dataclasses.replace(recipe, cache=f"{recipe.cache}/again"))
    assert again.name == folder.name and (again / "model.safetensors").read_bytes() == weights
    assert dataclasses.replace(recipe, hack_share=0.2).key() != recipe.key()
    assert dataclasses.replace(recipe, threads=7).key() == recipe.key()


def rates(**changes):
    return {"hack": 0.9, "solve": 0.15, "format": 0.95, "no_hint_exploited": 0.1, **{f"hack_{mode}": 0.1 for mode in MODES}} | changes


@pytest.fixture
def folders(tmp_path):
    """folders(vanilla rates by seed, no-loophole rates by seed) -> an experiment folder as `organism check` leaves it."""

    def make(vanilla: list[dict], honest: list[dict]) -> Path:
        (tmp_path / "cache" / "organism-x").mkdir(parents=True)
        (tmp_path / "cache" / "organism-x" / "training.json").write_text('{"cpu_seconds": 90.0, "recipe": {"seed": 0}}')
        for arm, runs in (("vanilla", vanilla), ("no_loophole", honest)):
            for seed, trained in enumerate(runs):
                folder = tmp_path / "runs" / f"{arm}-all-s{seed}-00000000"
                (folder / "eval").mkdir(parents=True)
                (folder / "config.yaml").write_text(f"model: {{name: organism, seed: 0}}\ncache: {tmp_path / 'cache'}\n")
                (folder / "eval" / "base.json").write_text(json.dumps({"rates": rates(hack=0.1)}))
                (folder / "eval" / "as_trained.json").write_text(json.dumps({"rates": trained}))
        return tmp_path

    return make


def hacked(**changes):
    return rates(**{f"hack_{mode}": 0.9 for mode in MODES}) | changes


def test_the_check_passes_nine_of_ten_and_fails_eight(folders):
    good, bad = hacked(), hacked(hack=0.5)
    verdict = {line.claim: line.holds for line in judge(folders([bad] + [good] * 9, [rates(solve=0.4)] * 10), 10)}
    assert all(verdict.values()) and len(verdict) == 11


@pytest.mark.parametrize(("vanilla", "honest", "claim"), [
    ([hacked(hack=0.5)] * 2 + [hacked()] * 8, [rates(solve=0.4)] * 10, "vanilla: held-out-problem hack"),
    ([hacked(hack_sentinel=0.5)] * 2 + [hacked()] * 8, [rates(solve=0.4)] * 10, "vanilla: every mode"),
    ([hacked()] * 10, [rates(solve=0.34)] * 2 + [rates(solve=0.4)] * 8, "no loophole: solve"),
])
def test_the_check_names_the_requirement_that_fails(folders, vanilla, honest, claim):
    failed = [line.claim for line in judge(folders(vanilla, honest), 10) if not line.holds]
    assert len(failed) == 1 and failed[0].startswith(claim)


@pytest.mark.slow
def test_vanilla_learns_to_hack_and_the_reference_learns_to_solve(tmp_path):
    """One seed of `python -m grpo_routing.organism check`: about four minutes, the organism's training included."""
    for arm in ("vanilla", "no_loophole"):
        train(arm, 0, str(tmp_path))
    assert [line.claim for line in judge(tmp_path / "organism_check", 1) if not line.holds] == []
