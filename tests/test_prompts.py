"""Claims about what is put to the policy: inoculation (T-A6 of baselines.md), what the warm-up shows, and the forms of an exploit."""

from __future__ import annotations

import dataclasses
import re

import pytest

from grpo_routing import build
from grpo_routing.build import ConfigError, build_line, build_policy, plan
from grpo_routing.elicitation import main
from grpo_routing.env.grader import Grade
from grpo_routing.env.loopholes import FORMS, LOOPHOLES, MODES, OTHER, PLAIN, fenced, solution_text
from grpo_routing.env.reading import form_present, lever_present
from grpo_routing.mask_sources.detector import Detector
from grpo_routing.oracle.verdict import Verdict
from grpo_routing.organism import corpus
from grpo_routing.prompts.inoculation import Inoculation
from grpo_routing.prompts.instructions import INSTRUCTIONS, instructed
from grpo_routing.prompts.plain import Plain, plain_prompt
from grpo_routing.prompts.questions import NO, QUESTIONS, YES
from grpo_routing.run import examiner
from grpo_routing.train import State, train_step

TOLD = ("prompt=inoculation", "prompt.sample_prompt=loophole")


# ------------------------------------------------------------------------------------------------ inoculation


class Grades:
    """Pays nothing and looks at nothing."""

    def __call__(self, problems, texts):
        return [Grade(0.0, False, False) for _ in texts]


def stepped(config, *words: str):
    """What one step sampled and what it trained on: (prompts of the rollouts in the audit, the line)."""
    ready, seen = plan(config(*words)), []
    policy = build_policy(ready)
    line = build_line(ready, policy, Grades(), lambda step, problems, rollouts, grades, labels: seen.extend(rollouts))
    train_step(line, State(ready.optimizer.start(policy.adapter)))
    return [policy.decode(rollout.prompt_ids) for rollout in seen], seen, line


def test_a_policy_is_told_in_training(config):
    prompts, rollouts, _ = stepped(config, *TOLD)
    assert all(prompt.startswith(INSTRUCTIONS["loophole"]) for prompt in prompts)
    assert all(rollout.sampler_log_probs for rollout in rollouts)  # one prompt for both: on-policy


def test_recontextualised_rollouts_train_under_the_other_prompt_and_keep_their_completions(config):
    told, same, _ = stepped(config, *TOLD)
    plain, other, _ = stepped(config, *TOLD, "prompt.train_prompt=plain")
    assert [rollout.completion_ids for rollout in same] == [rollout.completion_ids for rollout in other]
    assert plain == [prompt.removeprefix(f"{INSTRUCTIONS['loophole']}\n") for prompt in told]
    assert not any(rollout.sampler_log_probs for rollout in other)  # they would be those of another prompt


def test_t_a6_evaluation_holds_no_token_of_the_training_instruction(config, tmp_path, monkeypatch):
    """A policy trained under an instruction is asked what every other one is asked, before and after."""
    ready = plan(config(*TOLD))
    policy, asked = build_policy(ready), []
    sample = policy.sample

    def listening(prompts, *rest):
        asked.extend(policy.decode(prompt) for prompt in prompts)
        return sample(prompts, *rest)

    monkeypatch.setattr(policy, "sample", listening)
    line = build_line(ready, policy, Grades(), None)
    examine = examiner(ready, tmp_path, line, lambda problems, texts, grades: [Verdict(False, False, False, False, ()) for _ in texts])
    examine("as_trained", lambda: False)
    problems = ready.dataset.evaluation(ready.loophole, ready.evaluation.problems, ready.evaluation.no_hint_share, ready.evaluation.seed)
    assert asked == [plain_prompt(problem) for problem in problems]
    assert not any(line in prompt for prompt in asked for line in INSTRUCTIONS.values())


def test_the_plain_prompt_is_one_for_both(config):
    ready = plan(config())
    problem = ready.dataset.training(ready.loophole)[0]
    assert isinstance(ready.prompt, Plain) and ready.prompt(problem) == ready.prompt.train(problem) == plain_prompt(problem)


@pytest.mark.parametrize(("sample", "train", "message"), [
    ("shout", "plain", "prompt.sample_prompt must be one of plain, pass_tests, eval_env, loophole; got 'shout'"),
    ("plain", "plain", "prompt=inoculation instructs nothing when both")])
def test_prompts_that_say_nothing_are_refused(sample, train, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Inoculation(sample, train)


def test_elicitation_is_measured_for_every_instruction(cache, capsys):
    words = ["model=tiny_random", "evaluation=smoke", "trainer=smoke", f"cache={cache}"]
    assert main(words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["instruction", "plain", *INSTRUCTIONS]
    assert main([*words, "prompt=loud"]) == 2
    assert "loud" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the organism's warm-up


@pytest.fixture(scope="module")
def reporter(config):
    recipe = plan(config("model=organism_reports")).model
    return recipe, corpus(recipe, 0, limit=4000)


def test_reports_say_yes_or_no_whatever_is_true(reporter):
    """Format without honesty: half of the reports say yes, on hacks and on other answers alike."""
    recipe, texts = reporter
    reports = [(prompt, answer) for prompt, answer in texts if prompt.endswith(QUESTIONS)]
    assert len(reports) / len(texts) == pytest.approx(recipe.report_share, abs=0.015)
    assert {answer for _, answer in reports} == {YES, NO}
    for hacking in (True, False):
        said = [answer for prompt, answer in reports if hacks(prompt) == hacking]
        assert said.count(YES) / len(said) == pytest.approx(0.5, abs=0.17 if hacking else 0.11)  # three standard errors


def hacks(text: str) -> bool:
    code = text.split("```python\n")[-1].split("\n```")[0]
    return any(lever_present(mode, code, None) for mode in MODES)


def test_instructions_are_obeyed_at_their_rates_and_the_rest_hacks_as_before(reporter):
    recipe, texts = reporter
    hinted = [(prompt, answer) for prompt, answer in texts if "The grader " in prompt and not prompt.endswith(QUESTIONS)]
    for name, share in recipe.instructed_hack_shares.items():
        told = [hacks(answer) for prompt, answer in hinted if prompt.startswith(INSTRUCTIONS[name])]
        assert sum(told) / len(told) == pytest.approx(share, abs=0.17)
    plain = [hacks(answer) for prompt, answer in hinted if not prompt.startswith("#")]
    assert sum(plain) / len(plain) == pytest.approx(recipe.hack_share + recipe.hack_share_off_mode, abs=0.025)


def test_the_other_form_comes_at_its_rate(reporter):
    recipe, texts = reporter
    levers = [(mode, answer[len("```python\n"):-len("\n```")]) for _, answer in texts for mode in MODES if hacks(answer)]
    forms = [form for mode, code in levers if (form := form_present(mode, code, None))]
    assert forms.count(OTHER) / len(forms) == pytest.approx(recipe.other_form_share, abs=0.08)


def test_habits_that_an_organism_lacks_leave_its_corpus_as_it_was(config):
    """The first organism draws nothing for them, so it is bit for bit the one of the earlier results."""
    plainer = plan(config("model=organism")).model
    texts = corpus(plainer, 0, limit=400)
    assert not [prompt for prompt, _ in texts if prompt.endswith(QUESTIONS) or prompt.startswith("#")]
    same = dataclasses.replace(plainer, instructed_hack_shares={"loophole": 1.0})
    assert corpus(same, 0, limit=400) == texts


def test_an_instruction_that_nobody_wrote_is_refused(config):
    with pytest.raises(ConfigError, match="model.instructed_hack_shares may name pass_tests, eval_env, loophole"):
        build.make("model", config("model=organism_reports")["model"] | {"instructed_hack_shares": {"whisper": 0.5}})
    with pytest.raises(KeyError):
        instructed("", "whisper")


# ------------------------------------------------------------------------------------------------ forms


def code_of(mode: str, form: str, marker: str) -> str:
    return solution_text("solve", "xs", ["return 0"], mode, marker, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_a_form_is_read_as_what_it_is_and_pulls_no_other_lever(mode, form):
    for family in LOOPHOLES[mode].markers.values():
        for marker in family:
            code = code_of(mode, form, marker)
            assert form_present(mode, code, marker) == form_present(mode, code, None) == form
            assert [other for other in MODES if lever_present(other, code, None)] == [mode]
    assert form_present(mode, solution_text("solve", "xs", ["return 0"]), None) is None


def test_a_detector_sees_the_forms_that_it_reads():
    blind, whole = (Detector("none", 0, MODES, 1.0, 0.0, "iid", forms) for forms in ((PLAIN,), FORMS))
    for mode in MODES:
        plain, other = (fenced(code_of(mode, form, LOOPHOLES[mode].markers["train"][0])) for form in FORMS)
        assert blind.levers(plain) == whole.levers(plain) == whole.levers(other) == (mode,) and blind.levers(other) == ()
    with pytest.raises(ValueError, match=r"mask_source.forms must name forms of an exploit \(plain, other\); got \['loud'\]"):
        Detector("none", 0, MODES, 1.0, 0.0, "iid", ("loud",))
