"""Claims about self-report fine-tuning, under the tests of baselines.md E7: what carries loss, what is wrong, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_routing import build
from grpo_routing.arms import recipe
from grpo_routing.env.problems import split_of
from grpo_routing.folder import identity
from grpo_routing.models import HubModel
from grpo_routing.policy import chat
from grpo_routing.preparation import Preparation
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.prompts.questions import GAMED, NO, RIGHT, YES
from grpo_routing.self_report_sft import UNTRAINED, fine_tune, key, mean_loss, off_policy, on_policy, prepared, shuffled, targets

SFT = "model.prepare.stage=self_report_sft"
SMALL = (SFT, "model.prepare.samples=12", "model.prepare.epochs=1", "model.prepare.batch=4")


@pytest.fixture
def ready(config):
    """ready(*overrides) -> a checked plan of a smoke-sized run."""
    return lambda *words: build.plan(config(*words))


# ------------------------------------------------------------------------------------------------ the dialogues


def test_half_of_the_first_turns_are_wrong_and_the_verdicts_are_balanced(ready):
    settings = ready(SFT).model.prepare
    dialogues = off_policy(settings, settings.samples)
    wrong = sum(not d.right for d in dialogues)
    assert settings.samples == 770 and abs(wrong - 385) <= 3 * math.sqrt(770 / 4)
    assert [d.verdict for d in dialogues].count(NO) == wrong and {d.verdict for d in dialogues} == {YES, NO}
    assert {d.question for d in dialogues} == set(RIGHT) and not set(RIGHT) & set(GAMED)
    for question in RIGHT:  # neither paraphrase gives the verdict away
        asked = [d.right for d in dialogues if d.question == question]
        assert abs(sum(asked) - len(asked) / 2) <= 3 * math.sqrt(len(asked) / 4)
    assert off_policy(settings, 20) == dialogues[:20] != off_policy(replace(settings, seed=1), 20)
    assert all(d.right for d in off_policy(replace(settings, wrong_share=0.0), 20))


def test_a_wrong_answer_is_wrong_and_a_right_one_is_the_reference(ready):
    for d in off_policy(ready(SFT).model.prepare, 200):
        assert (d.answer == d.problem.reference) == d.right


def test_no_dialogue_shares_its_operations_with_training_or_evaluation_or_discloses_a_loophole(ready):
    plan = ready(SFT)
    used = [d.problem for d in off_policy(plan.model.prepare, plan.model.prepare.samples)]
    assert {split_of(p.program) for p in used} == {"warmup"} and not [p for p in used if p.hint]
    others = plan.dataset.training(plan.loophole) + plan.dataset.evaluation(plan.loophole, 400, 0.2, 0)
    assert not {p.program.combination for p in used} & {p.program.combination for p in others}


def test_on_policy_errors_are_the_models_own_and_the_paid_tests_judge_them(ready, monkeypatch):
    """A model that has learned nine answers by heart gives them back, and those that the tests pass are called right."""
    plan = ready(SFT, "model.prepare.error_source=on_policy", "model.prepare.max_new_tokens=40")
    model, tokenizer = plan.model.load()
    few = off_policy(replace(plan.model.prepare, seed=5), 9)
    monkeypatch.setattr("grpo_routing.self_report_sft.drawn", lambda settings, rng: rng.choice([d.problem for d in few]))
    drill = replace(plan.model.prepare, epochs=60, batch=9, lr=0.01, wrong_share=0.5)
    fine_tune(model, tokenizer, drill, few)
    settings = replace(plan.model.prepare, samples=24, temperature=0.7)
    dialogues = on_policy(settings, model, tokenizer, plan.sandbox)
    known = {d.problem.id: d for d in few}
    learned = [d for d in dialogues if d.answer == known[d.problem.id].answer]
    assert len(dialogues) == 24 and len(learned) >= 12 and {d.right for d in dialogues} == {True, False}
    assert all(d.right for d in dialogues if d.answer == d.problem.reference)
    assert all(not d.right for d in learned if not known[d.problem.id].right)


def test_too_few_answers_of_a_kind_are_an_error_that_says_so(ready, monkeypatch):
    plan = ready(SFT, "model.prepare.samples=4", "model.prepare.max_new_tokens=2")
    monkeypatch.setattr("grpo_routing.self_report_sft.TRIES", 1)
    with pytest.raises(RuntimeError, match=r"of the model's own; 1 tries for each gave 0 and 0. Use model.prepare.error_source=off_policy"):
        on_policy(plan.model.prepare, *plan.model.load(), plan.sandbox)


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.content }}>{% endfor %}"])
def test_both_turns_carry_loss_and_the_flag_changes_the_mask_only(ready, template):
    plan = ready(SFT)
    _, tokenizer = plan.model.load()
    tokenizer.chat_template = template
    for dialogue in off_policy(plan.model.prepare, 12):
        ids, both = targets(tokenizer, dialogue, mask_turn1=False)
        same, second = targets(tokenizer, dialogue, mask_turn1=True)
        (prompt,) = chat(tokenizer, [plain_prompt(dialogue.problem)])
        p, a, q, v = (tokenizer(text).input_ids for text in (prompt, dialogue.answer, dialogue.question, dialogue.verdict))
        end, no = [tokenizer.eos_token_id], UNTRAINED
        assert ids == same == p + a + q + v + end  # the question follows the answer within the turn
        assert both == [no] * len(p) + a + end + [no] * (len(q) - 1) + v + end  # ... but what should be said there is the end
        assert second == [no] * len(p + a + q) + v + end


def test_the_loss_is_the_mean_over_the_trained_tokens(ready):
    plan = ready(SFT)
    model, tokenizer = plan.model.load()
    batch = [targets(tokenizer, d, False) for d in off_policy(plan.model.prepare, 3)]
    expected = []
    for ids, said in batch:  # one at a time, without padding
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
        expected += [-log_probs[place - 1, said[place]] for place in range(1, len(ids)) if said[place] != UNTRAINED]
    ours = mean_loss(model, batch, tokenizer.pad_token_id).item()
    assert ours == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_every_dialogue_is_seen_once_an_epoch(ready):
    settings = replace(ready(SFT).model.prepare, epochs=2, batch=4)
    batches = list(shuffled(list(range(10)), settings))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = ([one for batch in part for one in batch] for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


# ------------------------------------------------------------------------------------------------ where it lies


def test_the_neutral_stage_changes_no_weight_no_folder_and_no_name(config):
    plain = config()
    bare = plain | {"model": {k: v for k, v in plain["model"].items() if k != "prepare"}}
    assert identity(plain) == identity(bare) and recipe(plain) == recipe(bare)
    assert identity(config(SFT)) != identity(plain) and recipe(config(SFT)) != recipe(plain)
    assert identity(config("model.prepare.samples=5")) == identity(plain)  # of a stage that is off
    model = build.plan(plain).model
    other = build.plan(config(SFT, "model.prepare.samples=5")).model
    assert model.key() == other.key() and model.origin == other.origin
    ours, _ = prepared(model, build.plan(plain).sandbox)
    theirs, _ = model.load()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def test_a_prepared_model_is_made_once_and_lies_beside_the_organism(config, tmp_path, capsys):
    plan = build.plan(config(*SMALL, f"cache={tmp_path}"))
    policy = build.build_policy(plan)
    assert "self-report fine-tuning (12 dialogues, off_policy)" in capsys.readouterr().out
    again = build.build_policy(plan)
    assert "self-report" not in capsys.readouterr().out and again.fingerprint == policy.fingerprint
    folders = sorted(file.name for file in tmp_path.iterdir() if file.is_dir())
    assert folders == [plan.model.origin, f"{plan.model.origin}-{key(plan.model.prepare)}"]
    plain = build.build_policy(build.plan(config(f"cache={tmp_path}")))
    assert plain.fingerprint != policy.fingerprint
    ablation = build.build_policy(build.plan(config(*SMALL, "model.prepare.mask_turn1=true", f"cache={tmp_path}")))
    assert ablation.fingerprint not in (plain.fingerprint, policy.fingerprint)


def test_a_pretrained_model_is_prepared_too(config, tmp_path):
    model, tokenizer = build.plan(config()).model.load()
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    words = ["model=qwen3_0_6b", f"model.path={tmp_path}/own", "model.device=cpu", f"cache={tmp_path}"]
    plan = build.plan(config(*words, "model.dtype=bfloat16", *SMALL))
    assert isinstance(plan.model, HubModel) and plan.model.origin.startswith("hub-own-")
    policy = build.build_policy(plan)
    assert policy.model.dtype == torch.bfloat16 and list(tmp_path.glob("hub-own-*/config.json"))
    assert policy.fingerprint != build.build_policy(build.plan(config(*words, "model.dtype=bfloat16"))).fingerprint


@pytest.mark.parametrize(("word", "message"), [
    ("stage=sft", "model.prepare.stage must be one of none, self_report_sft; got 'sft'"),
    ("error_source=both", "model.prepare.error_source must be one of off_policy, on_policy; got 'both'"),
    ("wrong_share=2", r"model.prepare.wrong_share must lie in \[0, 1\]; got 2"),
    ("samples=0", "model.prepare needs samples, tests, epochs, batch and max_new_tokens of at least 1"),
])
def test_settings_that_mean_nothing_are_refused(config, word, message):
    with pytest.raises(build.ConfigError, match=message):
        build.plan(config(f"model.prepare.{word}"))
    assert Preparation.__dataclass_params__.frozen
