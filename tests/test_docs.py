"""The documents tell the truth: the walkthrough runs, tables are fresh, and every command, path and option exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from grpo_routing import stages, walkthrough
from tests.conftest import CONF

ROOT = CONF.parent
DOCUMENTS = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if file.exists()]
HOUSE = ("grpo_routing", "hydra_plugins", "conf", "docs", "tests", "benchmarks", "launchers", "notebooks")
ROOMS = ["Problem", "Prompt", "Tokens", "Rollout", "Grade", "Audit", "Advantage", "Gradient", "Hack basis", "Projection", "Step",
         "Deployment"]


def headings(text: str) -> list[str]:
    return [line for line in re.sub(r"~~~.*?~~~", "", text, flags=re.DOTALL).splitlines() if line.startswith("#")]


def code(text: str) -> list[str]:
    """Everything that a document sets in code: lines of fenced and indented blocks, and inline spans."""
    blocks = re.findall(r"^(```|~~~)[^\n]*\n(.*?)^\1", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^(```|~~~)[^\n]*\n.*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    return [line.strip() for _, block in blocks for line in block.splitlines()] + indented + re.findall(r"`([^`\n]+)`", rest)


@pytest.fixture(scope="module")
def page(config) -> str:
    """The walkthrough of an untrained model of seconds."""
    return walkthrough.page(config("arm=route", "loophole=held_out"))


# ------------------------------------------------------------------------------------------------- the walkthrough


def test_the_rooms_come_in_order(page):
    assert headings(page) == ["# One rollout through the house", *(f"## {room}" for room in ROOMS)]


def test_without_a_hack_the_first_rollout_is_followed_and_the_text_says_so(page):
    assert " 0 hacked.\nWe follow number 0, simply the first, because none of them hacked" in page
    assert "| all that hacked (0) | – | – | – |" in page
    assert "solved no, hacked no" in page


def test_the_walk_is_a_step_of_the_line(page):
    """Per-rollout rows, an ordinary backward and what the projection was given agree; the audit answers nothing."""
    assert re.search(r"to within 1e-\d+ of its norm", page)
    assert "The line called the audit and got back `None`" in page


def test_asking_again_gives_the_same_page(page, config):
    assert walkthrough.page(config("arm=route", "loophole=held_out")) == page


def test_the_committed_page_has_the_rooms_of_the_script_and_shows_a_hack(page):
    committed = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert headings(committed) == headings(page), "run python -m grpo_routing.walkthrough --write"
    assert "the first that hacked" in committed


def test_unknown_words_are_refused(capsys):
    assert walkthrough.main(["--wirte"]) == 2
    assert capsys.readouterr().err == "expected nothing or --write; got --wirte\n"


# ------------------------------------------------------------------------------------------------ the table of stages


def test_the_tables_of_arms_are_fresh():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert stages.with_tables(text) == text, "run python -m grpo_routing.walkthrough --write"


def test_what_arms_declare_is_read_off_their_objects():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in stages.declared_table().splitlines()]
    rows = {row[0]: row[1:] for row in lines}
    assert sorted(rows) == sorted([*(f"`{arm}`" for arm in stages.arms()), "arm", "---"])
    assert rows["`vanilla`"] == ["–", "–", "nothing", "nothing"]  # its mask source measures and does not act
    assert rows["`penalty`"] == ["mask_source, advantage", "code", "the known ones", "nothing"]
    assert rows["`inoculation`"] == ["prompt", "instruction", "nothing", "instruction dropped"]
    assert rows["`suppression`"] == ["sampling", "pairs, activations", "the known ones", "hooks of sampling gone"]
    assert [arm for arm, row in rows.items() if any("oracle" in cell for cell in row)] == ["`ceiling`"], "only its runs may read the truth"
    assert rows["`ceiling`"][2:] == ["**all, from the oracle (stamped)**", "quarantine deleted"]
    assert rows["`vanilla_svd`"] == rows["`vanilla`"]  # its quarantine is zero and stays it
    assert rows["`route`"][3] == "quarantine deleted"
    assert rows["`teacher`"] == ["extra_rollouts", "the pool's answers", "the known ones", "nothing"]
    assert rows["`erase`"] == ["mask_source, projection", "pairs", "the known ones", "nothing"]


def test_the_table_of_stages_says_what_an_arm_changes():
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    begin, end = stages.between("stages")
    table = table.split(begin)[1].split(end)[0].strip()
    head, _, default, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    arms = {row[0].strip("`"): dict(zip(head, row)) for row in rows}
    assert sorted(arms) == sorted(file.stem for file in (CONF / "arm").glob("*.yaml") if file.stem != "custom")
    assert dict(zip(head, default))["projection"] == "*measure_only*"
    assert (arms["route"]["projection"], arms["route"]["adapter"], arms["route"]["optimizer"]) == (
        "`route_subspace`", "`svd`", "`lr=0.05`")
    assert arms["no_loophole"] == dict.fromkeys(head, "") | {"arm": "`no_loophole`", "loophole": "`pays=False`"}


@pytest.mark.parametrize("group", ["advantage", "projection", "mask_source", "extra_rollouts", "adapter", "prompt", "sampling"])
def test_methods_names_every_option_of_a_stage(group):
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for option in sorted(file.stem for file in (CONF / group).glob("*.yaml")):
        assert f"`{option}`" in text or f"`{group}={option}`" in text, f"docs/methods.md says nothing about {group}={option}"


# --------------------------------------------------------------------------------------- commands, paths and options


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_module_and_target_that_is_named_exists(document):
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for module in re.findall(r"python3? -m ([a-zA-Z_][\w.]*\w)", text):
        assert importable(module), f"{document.name}: python -m {module}"
    for target in (word for line in code(text) for word in re.findall(r"^(?:\$ )?make ([a-z][a-z-]*)", line)):
        assert target in targets, f"{document.name}: make {target}"


def importable(module: str) -> bool:
    """Whether `python -m module` finds something to run."""
    parent = module.rpartition(".")[0]
    if parent and not importable(parent):
        return False
    return find_spec(module) is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_path_and_name_that_is_mentioned_exists(document):
    text = document.read_text(encoding="utf-8")
    for span in code(text):
        found = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)*/?)(?::(\w+))?", span)
        if not found:
            continue
        path, name = found.groups()
        if path.split("/")[0] in HOUSE and "/" in path:
            assert (ROOT / path).exists(), f"{document.name}: {path}"
        elif re.search(r"\.(py|toml)$", path):
            assert any(file.as_posix().endswith("/" + path) for file in house_files()), f"{document.name}: {path}"
        if name and path.endswith(".py"):
            defined = re.findall(r"^\s*(?:def|class) (\w+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert name in defined, f"{document.name}: {path} has no {name}"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link and not link.startswith("#"):
            assert (document.parent / link.split("#")[0]).exists(), f"{document.name}: link {link}"


def house_files() -> list[Path]:
    return [ROOT / "pyproject.toml", *(file for room in HOUSE for file in (ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_option_and_setting_that_is_mentioned_exists(document):
    text = document.read_text(encoding="utf-8")
    groups = {folder.relative_to(CONF).as_posix() for folder in CONF.rglob("*") if folder.is_dir()}
    for group, key, value in re.findall(r"(?<![\w.])([a-z_/]+)(\.[a-z_.]+)?=([\w,|]*)", text):
        if group not in groups:
            continue
        if key:
            assert key[1:] in settings(group), f"{document.name}: {group}{key}"
        elif value:
            for option in re.split(r"[,|]", value):
                assert (CONF / group / f"{option}.yaml").exists(), f"{document.name}: {group}={option}"


def settings(group: str) -> set[str]:
    """Every key that some option of the group sets, `@package _global_` or not, and every place of it that another option fills."""
    keys = set()
    for file in (CONF / group).rglob("*.yaml"):
        loaded = yaml.safe_load(file.read_text()) or {}
        keys |= {place for entry in loaded.get("defaults", []) for place in re.findall(r"@([a-z]+)'", str(entry))}
        keys |= {f"{file.parent.name}.{key}" for key in loaded}  # of a group within the group: hydra.sweeper.controls
        inner = {f"{key}.{inner}" for key, value in loaded.items() if isinstance(value, dict) for inner in value}
        keys |= set(loaded) | set(loaded.get(group, {})) | inner | {f"{file.parent.name}.{key}" for key in inner}
    return keys


def test_the_checks_above_would_notice():
    """They read code where code stands, and a wrong word is not there."""
    text = "a `make run` b\n\n    make test\n\n```bash\npython -m x\n```\n`conf/arm`"
    assert code(text) == ["python -m x", "make test", "make run", "conf/arm"]
    assert importable("grpo_routing.report") and not importable("grpo_routing.reports") and not importable("nowhere.at.all")
    assert "gate" in settings("projection") and "gates" not in settings("projection")
    assert {"first", "inner", "pairs", "calibration.share"} <= settings("mask_source")
