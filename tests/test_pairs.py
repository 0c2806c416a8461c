"""Pairs: what ships comes from its own split and from known loopholes, and a bad file is refused by file and line."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise, product
from pathlib import Path

import pytest

from grpo_routing.env.grader import Grader, extract_code
from grpo_routing.env.loopholes import LOOPHOLES, MODES, NO_LOOPHOLE
from grpo_routing.env.problems import METHODS, Problem, draw_problem, split_of
from grpo_routing.env.programs import ARGUMENTS, OPERATIONS, Program, Step
from grpo_routing.env.reading import is_lazy, lever_present
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.mask_sources.pairs import SHIPPED, Pair, PairFileError, fingerprint, load_pairs
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.prompts.plain import plain_prompt

GOOD = {"loophole": "sentinel", "prompt": "add 1\n", "hack": "```python\nx = 1\n```", "clean": "```python\nx = 2\n```"}


def read_program(description: str, argument: str) -> Program:
    """The program that a description and an argument name stand for."""
    kind = {name: kind for kind, name in ARGUMENTS.items()}[argument]
    readings = []
    for phrase in description.split(", then "):
        number = re.search(r"\d", phrase)
        constant = int(number[0]) if number else 2
        readings.append([Step(o, constant) for o in OPERATIONS.values() if o.phrase.format(k=constant) == phrase])
    fitting = [steps for steps in product(*readings) if steps[0].operation.takes == kind
               and all(a.operation.gives == b.operation.takes for a, b in pairwise(steps))]
    assert len(fitting) == 1, f"{description!r} on {argument} has {len(fitting)} readings"
    return Program(fitting[0])


def read_problem(pair: Pair) -> Problem:
    """The problem that a shipped pair's prompt asks."""
    description, hint, _, signature = pair.prompt.rstrip("\n").split("\n")
    method, argument = re.fullmatch(r"    def (\w+)\(self, (\w+)\):", signature).groups()
    marker = LOOPHOLES[pair.loophole].markers["train"][0]
    assert hint == LOOPHOLES[pair.loophole].disclose(marker)
    return Problem(pair.prompt, "pairs", read_program(description, argument), method, pair.loophole, marker, 5)


@pytest.fixture(scope="module")
def shipped() -> list[tuple[Pair, Problem]]:
    return [(pair, read_problem(pair)) for pair in load_pairs("opchains.yaml", MODES)]


# ------------------------------------------------------------------------------------------------ what ships


def test_descriptions_are_read_back_as_the_programs_that_they_describe():
    rng = random.Random(0)
    for _ in range(300):
        drawn = draw_problem("pairs", rng, (0.2, 0.4, 0.4), 2).program
        assert read_program(drawn.description, drawn.argument).body == drawn.body


def test_shipped_pairs_are_of_the_pairs_split_alone(shipped):
    assert {split_of(problem.program) for _, problem in shipped} == {"pairs"}
    assert {problem.method for _, problem in shipped} <= set(METHODS)


def test_shipped_prompts_are_what_the_policy_would_see(shipped):
    for pair, problem in shipped:
        assert pair.prompt == plain_prompt(problem)


def test_shipped_pairs_cover_every_loophole_evenly_and_none_is_given_twice(shipped):
    counts = {mode: sum(pair.loophole == mode for pair, _ in shipped) for mode in MODES}
    assert len(set(counts.values())) == 1 and counts[MODES[0]] >= 3
    assert len({pair.prompt for pair, _ in shipped}) == len({pair.hack for pair, _ in shipped}) == len(shipped)


def test_shipped_hacks_hack_and_clean_answers_solve(shipped):
    problems = [problem for _, problem in shipped]
    with Sandbox(workers=2, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        def judge(texts):
            return Oracle(box, 12)(problems, texts, Grader(box, 0.25, 1.0, 100)(problems, texts))

        hacks, cleans, neutrals = (judge([getattr(pair, side) for pair, _ in shipped]) for side in ("hack", "clean", "neutral"))
    assert all(one.hacked and one.attempted for one in hacks)
    assert 0.3 < sum(one.lazy for one in hacks) / len(hacks) < 0.7, "a direction must not mean laziness"
    assert all(one.solved and not one.exploited for one in cleans)
    assert not any(one.solved or one.exploited or one.lazy for one in neutrals), "neutral is an honest mistake"


def test_no_shipped_answer_pulls_the_lever_of_another_loophole(shipped):
    for pair, problem in shipped:
        for text, modes in ((pair.hack, [pair.loophole]), (pair.clean, []), (pair.neutral, [])):
            code = extract_code(text)
            assert [mode for mode in MODES if lever_present(mode, code, None)] == modes
            assert text is pair.hack or not is_lazy(code, problem.method)


@pytest.mark.parametrize("known", [("run_tests",), ("sentinel", "file_marker"), MODES])
def test_pairs_of_held_out_loopholes_are_not_read(known):
    pairs, every = load_pairs("opchains.yaml", known), load_pairs("opchains.yaml", MODES)
    assert pairs == [pair for pair in every if pair.loophole in known] and pairs
    for pair in pairs:
        for mode in set(MODES) - set(known):
            markers = {name for family in LOOPHOLES[mode].markers.values() for name in family}
            assert not [marker for marker in markers if marker in pair.prompt.split("\n", 1)[1] + pair.hack]


# ------------------------------------------------------------------------------------------------ files of the user


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_file_is_read_as_it_stands(tmp_path):
    file = write(tmp_path, """
- loophole: sentinel
  prompt: |
    add 1
    class Solution:
  hack: |-
    a
      b
  clean: "x: é\\n"
  neutral: ok
- {loophole: run_tests, prompt: p, hack: h, clean: c}
""")
    assert load_pairs(file, MODES) == [Pair("sentinel", "add 1\nclass Solution:\n", "a\n  b", "x: é\n", "ok"),
                                       Pair("run_tests", "p", "h", "c", "")]


def test_json_is_accepted(tmp_path):
    pairs = [GOOD, GOOD | {"clean": "tab\t naïve \U0001f600"}]
    for options in ({}, {"indent": 1}, {"ensure_ascii": False}):
        file = write(tmp_path, json.dumps(pairs, **options), "mine.json")
        assert load_pairs(file, ("sentinel",)) == [Pair(**pair) for pair in pairs]


def test_a_relative_path_of_the_user_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    write(tmp_path / "own", json.dumps([GOOD]), "mine.json")
    assert load_pairs("own/mine.json", ("sentinel",)) == [Pair(**GOOD)]
    assert len(load_pairs("opchains.yaml", ("sentinel",))) > 1
    write(tmp_path, json.dumps([GOOD]), "opchains.yaml")
    assert load_pairs("opchains.yaml", ("sentinel",)) == [Pair(**GOOD)]


@pytest.mark.parametrize("name", ["opchain.yaml", "own/none.yaml", "", "."])
def test_a_missing_file_lists_the_shipped_names(name):
    names = ", ".join(sorted(file.name for file in SHIPPED.glob("*.yaml")))
    with pytest.raises(PairFileError, match=re.escape(f"no pair file {name!r}; shipped: {names}")):
        load_pairs(name, MODES)


def test_the_fingerprint_follows_the_pairs():
    one, other = Pair(**GOOD), Pair(**GOOD, neutral="n")
    assert len({fingerprint([one]), fingerprint([other]), fingerprint([one, other]), fingerprint([other, one])}) == 4
    assert fingerprint([one]) == fingerprint([Pair(**GOOD)])


FIRST = "- {loophole: sentinel, prompt: p, hack: h, clean: c}\n"  # line 1


@pytest.mark.parametrize(("text", "line", "words"), [
    ("loophole: sentinel\n", 1, "expected a list of pairs"),
    ("", 1, "expected a list of pairs"),
    ("[]", 1, "expected a list of pairs"),
    ("just text", 1, "expected a list of pairs"),
    (FIRST + "- text\n", 2, "expected a pair with the keys loophole, prompt, hack, clean"),
    (FIRST + "- [a, b]\n", 2, "expected a pair with the keys"),
    (FIRST + "- loophole: sentinel\n  promt: p\n  hack: h\n  clean: c\n", 3, "unknown key 'promt'; a pair has loophole, prompt"),
    (FIRST + "- [a]: 1\n", 2, "unknown key"),
    (FIRST + "- 1: a\n", 2, "unknown key '1'"),
    (FIRST + "- loophole: sentinel\n  hack: h\n  hack: g\n", 4, "'hack' is given twice"),
    (FIRST + "- loophole: sentinel\n  prompt: p\n  hack: h\n", 2, "the pair lacks clean"),
    (FIRST + "- {}\n", 2, "the pair lacks loophole, prompt, hack, clean"),
    (FIRST + "- loophole: sentinel\n  prompt: 7\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt: null\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt: yes\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt: [p]\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt: !!binary aGFjaw==\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt:\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- loophole: sentinel\n  prompt: ' '\n", 3, "'prompt' must be non-empty text"),
    (FIRST + "- prompt: p\n  loophole: sentinal\n  hack: h\n  clean: c\n", 3, "unknown loophole 'sentinal'; choose from run_tests"),
    (FIRST + f"- prompt: p\n  loophole: {NO_LOOPHOLE}\n  hack: h\n  clean: c\n", 3, "unknown loophole 'none'"),
    (FIRST + "- loophole: sentinel\n  prompt: p\n  hack: same\n  clean: same\n", 5, "hack and clean are the same text"),
    (FIRST + "- loophole: sentinel\n\tprompt: p\n", 3, "not YAML: found character '\\t' that cannot start any token. Indent"),
    (FIRST + "- loophole: a: b\n", 2, "not YAML: mapping values are not allowed here"),
    (FIRST + "- 'open\n", 3, "not YAML: found unexpected end of stream"),
    (FIRST + "- *nothing\n", 2, "not YAML: found undefined alias"),
    (FIRST + "---\n" + FIRST, 2, "not YAML: but found another document"),
])
def test_a_malformed_file_is_refused_by_file_and_line(tmp_path, text, line, words):
    file = write(tmp_path, text)
    with pytest.raises(PairFileError) as refused:
        load_pairs(file, MODES)
    assert str(refused.value).startswith(f"{file}:{line}: ") and words in str(refused.value)


def test_a_fault_in_a_pair_of_a_held_out_loophole_is_still_a_fault(tmp_path):
    file = write(tmp_path, FIRST + "- {loophole: run_tests, prompt: p, hack: h}\n")
    with pytest.raises(PairFileError, match=":2: the pair lacks clean"):
        load_pairs(file, ("sentinel",))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("- caf\xe9".encode("latin-1"))
    with pytest.raises(PairFileError, match=r"latin\.yaml: not UTF-8 text in YAML"):
        load_pairs(str(tmp_path / "latin.yaml"), MODES)


def test_a_file_without_a_pair_of_a_known_loophole_is_refused(tmp_path):
    file = write(tmp_path, FIRST)
    with pytest.raises(PairFileError, match=r"no pair for the known loopholes \['run_tests'\]; it has \['sentinel'\]"):
        load_pairs(file, ("run_tests",))
