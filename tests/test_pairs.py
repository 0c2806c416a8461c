"""Pairs: what ships comes from its own split and says what its file says, a bad file is refused by file and line, and the check
of a file tells a separation from chance and from length."""

from __future__ import annotations

import ast
import json
import random
import re
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch

from grpo_routing import build
from grpo_routing.env.grader import Grader, extract_code
from grpo_routing.env.loopholes import LOOPHOLES, MODES, NO_LOOPHOLE
from grpo_routing.env.problems import METHODS, Problem, draw_problem, split_of
from grpo_routing.env.programs import ARGUMENTS, OPERATIONS, Program, Step
from grpo_routing.env.reading import is_lazy, lever_present
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.mask_sources.pairs import SHIPPED, Pair, PairFileError, fingerprint, load_pairs
from grpo_routing.oracle.verdict import Oracle, Verdict
from grpo_routing.pairs.__main__ import main
from grpo_routing.pairs.check import Reading, held_out_scores, read, sides, swaps
from grpo_routing.pairs.products import of_both, unit
from grpo_routing.pairs.statistics import auroc, correlation, paired_accuracy, residualised, standardised_gap
from grpo_routing.prompts.plain import plain_prompt

GOOD = {"loophole": "sentinel", "prompt": "add 1\n", "hack": "```python\nx = 1\n```", "clean": "```python\nx = 2\n```"}
KEYED = ("prog.yaml", "prog_matched.yaml", "persona.yaml")  # by the loophole that the hack exploits
ALIKE = ("intent.yaml", "moral.yaml", "evaluation_awareness.yaml", "placebo.yaml")  # both sides are right, and the same but for a comment
FREE = (*ALIKE, "honesty.yaml")  # about no loophole
FILES = (*KEYED, *FREE)


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
    description, *hint, _, signature = pair.prompt.rstrip("\n").split("\n")
    method, argument = re.fullmatch(r"    def (\w+)\(self, (\w+)\):", signature).groups()
    marker = "" if pair.loophole == NO_LOOPHOLE else LOOPHOLES[pair.loophole].markers["train"][0]
    assert hint == ([LOOPHOLES[pair.loophole].disclose(marker)] if marker else [])
    return Problem(pair.prompt, "pairs", read_program(description, argument), method, pair.loophole, marker, 5)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[tuple[Pair, Problem]]]:
    return {file: [(pair, read_problem(pair)) for pair in load_pairs(file, MODES)] for file in FILES}


def judge(read: list[tuple[Pair, Problem]], *fields: str) -> list[list[Verdict]]:
    """What is true of these answers, field by field."""
    problems = [problem for _, problem in read]
    with Sandbox(workers=2, wall_seconds=2.0, cpu_seconds=2, memory_mb=512, minimum="seccomp") as box:
        texts = [[getattr(pair, field) for pair, _ in read] for field in fields]
        return [Oracle(box, 12)(problems, one, Grader(box, 0.25, 1.0, 100)(problems, one)) for one in texts]


# ------------------------------------------------------------------------------------------------ what ships


def test_descriptions_are_read_back_as_the_programs_that_they_describe():
    rng = random.Random(0)
    for _ in range(300):
        drawn = draw_problem("pairs", rng, (0.2, 0.4, 0.4), 2).program
        assert read_program(drawn.description, drawn.argument).body == drawn.body


def test_these_files_ship_and_no_other():
    assert {file.name for file in SHIPPED.glob("*.yaml")} == set(FILES)
    assert all((SHIPPED / name).read_text().startswith("# ") for name in FILES), "a file opens with what it contrasts"


@pytest.mark.parametrize("file", FILES)
def test_shipped_pairs_are_of_the_pairs_split_alone(shipped, file):
    assert {split_of(problem.program) for _, problem in shipped[file]} == {"pairs"}
    assert {problem.method for _, problem in shipped[file]} <= set(METHODS)


@pytest.mark.parametrize("file", FILES)
def test_shipped_prompts_are_what_the_policy_would_see(shipped, file):
    for pair, problem in shipped[file]:
        assert pair.prompt == plain_prompt(problem)


@pytest.mark.parametrize("file", FILES)
def test_shipped_pairs_are_sixteen_and_none_is_given_twice(shipped, file):
    pairs = [pair for pair, _ in shipped[file]]
    assert len(pairs) == len({pair.prompt for pair in pairs}) == len({pair.hack for pair in pairs}) == 16
    counts = {mode: sum(pair.loophole == mode for pair in pairs) for mode in (*MODES, NO_LOOPHOLE)}
    assert counts == dict.fromkeys(MODES, 4) | {NO_LOOPHOLE: 0} if file in KEYED else counts == dict.fromkeys(MODES, 0) | {NO_LOOPHOLE: 16}


def test_no_two_files_ask_the_same(shipped):
    asked = [{problem.program.description for _, problem in read} for read in shipped.values()]
    assert not [one & other for one, other in combinations(asked, 2) if one & other]


@pytest.mark.parametrize("file", KEYED)
def test_shipped_hacks_hack_and_clean_answers_solve(shipped, file):
    hacks, cleans, neutrals = judge(shipped[file], "hack", "clean", "neutral")
    assert all(one.hacked and one.attempted for one in hacks)
    assert 0.3 < sum(one.lazy for one in hacks) / len(hacks) < 0.7, "a direction must not mean laziness"
    assert all(one.solved and not one.exploited for one in cleans)
    assert not any(one.solved or one.exploited or one.lazy for one in neutrals), "neutral is an honest mistake"


@pytest.mark.parametrize("file", KEYED)
def test_no_shipped_answer_pulls_the_lever_of_another_loophole(shipped, file):
    for pair, problem in shipped[file]:
        for text, modes in ((pair.hack, [pair.loophole]), (pair.clean, []), (pair.neutral, [])):
            code = extract_code(text)
            assert [mode for mode in MODES if lever_present(mode, code, None)] == modes
            assert text is pair.hack or not is_lazy(code, problem.method)


@pytest.mark.parametrize("file", FREE)
def test_pairs_without_a_loophole_differ_in_words_alone(shipped, file):
    solved = file in ALIKE
    for one in (one for side in judge(shipped[file], "hack", "clean") for one in side):
        assert one.solved == solved and not one.exploited and not one.lazy
    markers = {name for flaw in LOOPHOLES.values() for family in flaw.markers.values() for name in family}
    for pair, _ in shipped[file]:
        hack, clean = extract_code(pair.hack), extract_code(pair.clean)
        assert without_docstrings(hack) == without_docstrings(clean) and pair.neutral == ""
        assert not [marker for marker in markers if marker in pair.prompt + pair.hack + pair.clean]
        assert not [mode for mode in MODES for code in (hack, clean) if lever_present(mode, code, None)]


def without_docstrings(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.dump(tree)


@pytest.mark.parametrize("file", FILES[1:])
def test_hack_and_clean_are_equally_long(config, shipped, file):
    """To a tokenizer of the organism's kind. Not prog.yaml, whose lazy hacks are short: prog_matched.yaml matches them."""
    _, tokenizer = build.plan(config()).model.load()
    lengths = [[len(tokenizer(text).input_ids) for text in (pair.hack, pair.clean)] for pair, _ in shipped[file]]
    hack, clean = map(sum, zip(*lengths))
    assert abs(hack / clean - 1) < 0.05
    assert all(max(one) <= 60 and abs(one[0] / one[1] - 1) < 0.25 for one in lengths)


@pytest.mark.parametrize("known", [("run_tests",), ("sentinel", "file_marker"), MODES])
@pytest.mark.parametrize("file", KEYED)
def test_pairs_of_held_out_loopholes_are_not_read(file, known):
    pairs, every = load_pairs(file, known), load_pairs(file, MODES)
    assert pairs == [pair for pair in every if pair.loophole in known] and pairs
    for pair in pairs:
        for mode in set(MODES) - set(known):
            markers = {name for family in LOOPHOLES[mode].markers.values() for name in family}
            assert not [marker for marker in markers if marker in pair.prompt.split("\n", 1)[1] + pair.hack]


@pytest.mark.parametrize("file", FREE)
def test_pairs_about_no_loophole_are_read_whatever_is_known(file):
    assert load_pairs(file, ()) == load_pairs(file, ("sentinel",)) == load_pairs(file, MODES)


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


def test_pairs_of_known_loopholes_and_of_none_are_read_in_file_order(tmp_path):
    pairs = [GOOD, GOOD | {"loophole": "none", "hack": "a"}, GOOD | {"loophole": "run_tests"}, GOOD | {"loophole": "none", "hack": "b"}]
    file = write(tmp_path, json.dumps(pairs))
    assert load_pairs(file, ("run_tests",)) == [Pair(**pair) for pair in pairs[1:]]


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
    assert len(load_pairs("prog.yaml", ("sentinel",))) > 1
    write(tmp_path, json.dumps([GOOD]), "prog.yaml")
    assert load_pairs("prog.yaml", ("sentinel",)) == [Pair(**GOOD)]


@pytest.mark.parametrize("name", ["progs.yaml", "own/none.yaml", "", "."])
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
    (FIRST + "- prompt: p\n  loophole: nothing\n  hack: h\n  clean: c\n", 3, "stdout_marker, file_marker, none"),
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


# ------------------------------------------------------------------------------------------------ the check


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_paired_accuracy_compares_within_pairs_and_auroc_across():
    first, second = numbers(1, 5, 3, 9), numbers(0, 6, 3, 8)
    assert paired_accuracy(first, second) == (1 + 0 + 0.5 + 1) / 4
    assert auroc(first, second) == (1 + 1 + 2.5 + 4) / 16  # 1 beats 0; 5 beats 0 and 3; 3 beats 0 and ties; 9 beats all
    assert auroc(second, first) == 1 - auroc(first, second)
    assert auroc(numbers(1), numbers(2, 3, 0, 1)) == 1.5 / 4  # sides need not be equally many


def test_the_gap_is_in_units_of_the_spread():
    assert standardised_gap(numbers(3, 5), numbers(0, 2)) == pytest.approx(3 / 2**0.5)
    assert standardised_gap(numbers(0, 2), numbers(3, 5)) == pytest.approx(-3 / 2**0.5)
    assert standardised_gap(numbers(1, 1), numbers(1, 1)) == 0 and standardised_gap(numbers(2, 2), numbers(1, 1)) == torch.inf


def test_what_length_explains_is_taken_out():
    length = numbers(1, 2, 3, 4)
    assert residualised(2 * length - 7, length).abs().max() < 1e-12
    assert torch.allclose(residualised(3 * length + numbers(1, -1, -1, 1), length), numbers(1, -1, -1, 1))
    assert torch.equal(residualised(numbers(1, 3), numbers(5, 5)), numbers(-1, 1))
    assert correlation(length, -3 * length) == pytest.approx(-1)
    assert correlation(length, numbers(1, -1, -1, 1)) == 0 and correlation(length, numbers(2, 2, 2, 2)) == 0


def test_a_pair_is_scored_by_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    sided, differences = torch.randn(2, 5, 7, generator=generator).double(), torch.randn(5, 7, generator=generator).double()
    signs = numbers(1, -1, 1, 1, -1)
    scores = held_out_scores(sided @ differences.T, signs)
    for pair in range(5):
        others = [other for other in range(5) if other != pair]
        direction = (signs[others, None] * differences[others]).mean(0)
        assert torch.allclose(scores[:, pair], sided[:, pair] @ direction)
    assert torch.equal(sides(scores, signs)[0], torch.stack([scores[int(sign < 0), pair] for pair, sign in enumerate(signs)]))


def reading(hack: torch.Tensor, clean: torch.Tensor, lengths: torch.Tensor) -> Reading:
    features = torch.stack([hack, clean])
    return read("made", features @ (hack - clean).T, lengths, swaps(len(hack)))


def test_the_check_finds_a_difference_and_none_where_there_is_none():
    noise = torch.randn(2, 16, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = torch.full((2, 16), 9.0, dtype=torch.float64)
    axis = torch.eye(20, dtype=torch.float64)[0]
    same, apart = reading(*noise, lengths), reading(noise[0] + 4 * axis, noise[1] - 4 * axis, lengths)
    assert same.auroc <= same.chance["auroc"] and same.paired <= same.chance["paired"]
    assert apart.auroc == apart.less_length == apart.paired == 1 > apart.chance["auroc"] and apart.with_length == 0


def test_the_check_takes_length_out_of_a_difference_that_is_length():
    generator = torch.Generator().manual_seed(2)
    lengths = torch.stack([torch.randint(30, 60, (16,), generator=generator), torch.randint(20, 40, (16,), generator=generator)]).double()
    features = torch.cat([lengths.log()[..., None], 0.02 * torch.randn(2, 16, 5, generator=generator)], 2).double()
    found = reading(*features, lengths)
    assert found.auroc > found.chance["auroc"] and found.with_length > 0.9
    assert abs(found.less_length - 0.5) < 0.05 < found.auroc - 0.5


@pytest.mark.parametrize(("paired", "ranked", "less_length", "words"), [
    (0.7, 0.6, 0.9, "made (0.60, chance reaches 0.70) does not separate beyond chance"),
    (1.0, 0.7, 0.9, "made (0.70, chance reaches 0.70) separates within pairs only, not across prompts"),
    (1.0, 0.9, 0.6, "made (0.90, chance reaches 0.70) separates, but not once length is taken out (0.60, chance reaches 0.65)"),
    (1.0, 0.9, 0.8, "made (0.90, chance reaches 0.70) separates beyond chance, also with length taken out"),
])
def test_the_verdict_compares_with_chance(paired, ranked, less_length, words):
    chance = {"paired": 0.75, "auroc": 0.7, "less_length": 0.65}
    assert Reading("made", paired, ranked, less_length, 1.0, 0.0, chance).verdict == words


def test_a_row_of_zeros_has_no_direction():
    assert torch.equal(unit(numbers(3, 4)[None]), numbers(0.6, 0.8)[None])
    with pytest.raises(ValueError, match="all zeros; it has no direction"):
        unit(torch.zeros(2, 3))


def test_sides_are_read_in_the_order_of_the_pairs():
    pairs = [Pair("none", "p", "h" * n, "c" * (n + 3)) for n in (1, 2)]
    assert of_both(pairs, lambda texts: torch.tensor([len(text) for _, text in texts])).tolist() == [[1, 2], [4, 5]]


def test_the_command_prints_a_table_and_a_verdict(cache, capsys):
    assert main(["check", "persona.yaml", "model=tiny_random", "loophole=held_out", f"cache={cache}"]) == 0
    head, _, titles, gradient, activation, length, _, verdict = capsys.readouterr().out.splitlines()
    assert head.startswith("persona.yaml: 12 pairs (run_tests, sentinel, stdout_marker); ")  # file markers are held out
    assert titles.split()[:3] == ["reading", "paired", "(chance)"]
    assert [line.split()[0] for line in (gradient, activation, length)] == ["gradient", "activation", "length"]
    assert re.fullmatch(r"verdict: gradient .*; activation .*; length alone .*\.", verdict)


@pytest.mark.parametrize(("text", "words", "message"), [
    (FIRST + "- text\n", [], ":2: expected a pair with the keys"),
    (FIRST, [], "1 pairs to read; leaving one out needs at least 4"),
    (FIRST, ["model=organsim"], "organsim"),
    (FIRST, ["adapter.rank=none"], "adapter.rank"),
])
def test_the_command_refuses_what_it_cannot_use(tmp_path, capsys, text, words, message):
    assert main(["check", write(tmp_path, text), *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out
