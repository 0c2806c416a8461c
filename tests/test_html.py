"""report.html: its numbers are those of results.json, what models wrote stays text, and nothing is loaded from anywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_routing import run
from grpo_routing.analysis import analyse, analysed
from grpo_routing.html import watch
from grpo_routing.html.comparison import SHOWN
from grpo_routing.html.headline import COLUMNS, rows
from grpo_routing.html.material import read
from grpo_routing.html.page import PAGE, asset, digest, render
from grpo_routing.html.provenance import command
from grpo_routing.html.samples import LONGEST, choose, trained
from grpo_routing.html.scatter import Point, front, points, spots
from grpo_routing.html.svg import POINTS, Line, chart, drawn, share, tag, thinned
from grpo_routing.preregistration import register
from grpo_routing.report import main, write
from grpo_routing.results import read_run, read_runs
from tests.browser.chromium import chromium
from tests.conftest import CONF
from tests.test_compare import fill
from tests.test_preregistration import CLAIM, sweep
from tests.test_report import ERASE, PERSONA, ROUTE, SVD, config, make_run
from tests.test_show import REWARD, rollout

HOSTILE = "</code></pre></script><script>boom()</script><img src=x onerror=boom()>'\"{{ 7*7 }}"


class Reader(HTMLParser):
    """Every element with its attributes, and the cells of the table of results."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[dict] = []
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list) -> None:
        found = dict(attributes)
        self.elements.append((name, found))
        if name == "tr" and "data-arm" in found:
            self.rows.append(found | {"values": []})
        if name == "td" and "data-value" in found and self.rows:
            self.rows[-1]["values"].append(found["data-value"])


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Two seeds of vanilla, a routed arm with a quarantine, a reference, a collapsed and a failed run."""
    root = tmp_path / "tiny"
    for seed, hack in enumerate((0.75, 1.0)):
        make_run(root, config("vanilla", seed, reward=REWARD), trained={"hack": hack}, audit={"hack": [0.0, 0.2, 0.4, 0.6, 0.8, hack]})
    routed = make_run(root, config("route", reward=REWARD, **SVD, **ROUTE, **PERSONA), quarantine=1.0,
                      trained={"hack": 0.875, "solve": 0.25, "hack_known": None}, deployed={"hack": 0.125, "hack_known": None},
                      audit={f"label_{name}": [None, 0.5, 0.6, 0.7, 0.8, 0.9] for name in ("auroc_known", "recall_known")})
    (routed / "scores.jsonl").write_text("")
    (routed / "rollouts.jsonl").write_text(rollout(5, HOSTILE))
    make_run(root, config("no_loophole", reward=REWARD, loophole__pays=False), trained={"hack": 0.0, "solve": 0.75})
    make_run(root, config("erase", reward=REWARD, health={"least_format": 0.2}, **ERASE), steps=4, trained={"format": 0.125},
             status={"state": "collapsed", "cause": "format lost: <b>0.1</b>"}, metrics={"train/format": [1.0, 0.5, 0.2, 0.1]})
    make_run(root, config("vanilla", 2, reward=REWARD), steps=3,
             status={"state": "failed", "error": "ValueError: bad", "traceback": "Traceback:\n  line 7\nValueError: bad"})
    return root


def page_of(experiment: Path, **options: object) -> str:
    material = read(experiment)
    return render(material, analysed(experiment, material.runs), **options)


# ------------------------------------------------------------------------------------------------ numbers


def test_every_number_of_the_table_is_that_of_results_json(experiment: Path) -> None:
    write(experiment)
    table = Reader((experiment / PAGE).read_text()).rows
    objects = json.loads((experiment / "results.json").read_text())
    material = read(experiment)
    assert len(table) == sum(len(entry.states) for entry in material.entries) == 5
    for row in table:
        entry = material.entries[int(row["data-arm"]) - 1]
        same = [one for one in objects if one["arm"] == entry.arm.config["arm_name"] and one["state"] == row["data-policy"]
                and one["status"] in ("done", "collapsed")]
        assert len(same) == int(row["data-seeds"])
        for rate, value in zip(COLUMNS.values(), row["values"], strict=True):
            measured = [one[rate] for one in same if one[rate] is not None]
            assert value == (f"{sum(measured) / len(measured):.6f}" if measured else ""), (entry.arm.label, rate)


def test_a_strip_shows_every_seed_and_the_base_and_the_reference(experiment: Path) -> None:
    page = page_of(experiment)
    cell = re.search(r'<td data-value="0\.875000"><b>0\.88</b> <small>\.75–1\.00</small>(<svg.*?</svg>)', page).group(1)
    assert re.findall(r'<circle cx="([\d.]+)%"', cell) == ["75", "100"]
    assert 'x1="50%" x2="50%" y1="5%" y2="95%" class="base"' in cell
    assert 'x1="0%" x2="0%" y1="5%" y2="95%" class="goal"' in cell
    routed = next(row for row in rows(read(experiment)) if row.label == "route")
    assert not any("goal" in cell.picture for cell in routed.cells), "the reference has another adapter"
    assert routed.cells[1].picture == routed.cells[1].sort == "" and routed.cells[1].value == "–"


def test_sections_appear_with_what_they_show(experiment: Path) -> None:
    page = page_of(experiment)
    ids = [found["id"] for name, found in Reader(page).elements if name == "section" and "id" in found]
    assert ids == ["headline", "comparison", "training", "generalisation", "deployment", "pareto", "quality", "health", "samples",
                   "provenance"]
    links = {found["href"][1:] for name, found in Reader(page).elements if name == "a" and found["href"].startswith("#")}
    assert links <= {found["id"] for _, found in Reader(page).elements if "id" in found}


def comparison_of(experiment: Path) -> str:
    return page_of(experiment).split('id="comparison"')[1].split("</section>")[0]


def test_differences_and_verdicts_are_those_of_compare(tmp_path: Path) -> None:
    register([CLAIM | {"matched_solve_within": None}], sweep(tmp_path), "none")
    fill(tmp_path, seeds=6)
    section = comparison_of(tmp_path)
    row = next(row for row in section.split("<tr>") if row.startswith('<th scope="row">penalty') and "<td>vanilla" in row)
    (known, held_out, solve) = re.findall(r"<b>([+-][\d.]+)</b> <small>([+-][\d.]+) to ([+-][\d.]+); p ([\d.]+)</small>", row)
    lines = {line.rate: line for line in analyse(tmp_path, read_runs(tmp_path)).lines if line.pair.kind == "vanilla"}
    for shown, rate in ((known, "hack_known"), (held_out, "hack_held_out"), (solve, "solve")):
        found, p = lines[rate].difference, lines[rate].p_corrected
        assert shown == (f"{found.mean:+.2f}", f"{found.low:+.2f}", f"{found.high:+.2f}", f"{p:.2g}")
    assert known[0] == "-0.75" and solve[0] == "+0.50"
    (verdict,) = re.findall(r"<tr><th scope=\"row\">H1</th>.*?<b>(\w+)</b>", section)
    assert verdict == "confirmed"
    assert "exploratory" not in section


def test_without_a_frozen_text_the_differences_are_called_exploratory(tmp_path: Path) -> None:
    assert "exploratory" in comparison_of(fill(tmp_path))


def test_a_refused_comparison_gives_its_reasons(experiment: Path, tmp_path: Path) -> None:
    section = comparison_of(experiment)
    assert "is not finished (failed: ValueError: bad)" in section.replace("<wbr>", "") and "<table>" not in section
    make_run(tmp_path, config("vanilla", 9))
    for seed in range(7):
        make_run(tmp_path, config("vanilla", seed), status={"state": "running"})
    section = comparison_of(tmp_path)
    assert section.count(" is not finished (running)") == SHOWN and "and 2 more" in section


def test_scales_of_a_deployed_run_are_drawn(experiment: Path) -> None:
    rates = {"hack_known": 0.5, "hack_held_out": None, "solve": 0.25, "monitored": 0.1, "bound": 0.2, "asked": 40}
    curve = [{"scale": scale} | rates for scale in (0.0, 0.5, 1.0)]
    said = {"limit": 0.15, "report": {"base": rates, "curve": curve}, "picks": {"zero": {"scale": 0.0}, "monitor_ucb": {"scale": None},
                                                                               "oracle": {"scale": 0.5}}}
    (experiment / "runs" / "route-held_out-s0" / "deploy.json").write_text(json.dumps(said))
    section = page_of(experiment).split('<section id="scale"')[1].split("</section>")[0]
    assert "known from .50 to .50, solve from .25 to .25, monitored from .10 to .10" in section and "seed 0, 40 problems" in section
    assert re.findall(r'<line x1="([\d.]+%?)"[^>]*class="pick"', section) == ["0%", "50%"] and "held-out from" not in section


# ------------------------------------------------------------------------------------------------ safety


def test_what_a_model_wrote_stays_text(experiment: Path) -> None:
    page = page_of(experiment)
    elements = Reader(page).elements
    assert sum(name == "script" for name, _ in elements) == 1 and not any(name == "img" for name, _ in elements)
    assert not any(key.startswith("on") or key == "style" for _, found in elements for key in found)
    assert "&lt;/code&gt;&lt;/pre&gt;&lt;/script&gt;&lt;script&gt;boom()" in page and "{{ 7*7 }}" in page
    assert "format lost: &lt;b&gt;0.1&lt;/b&gt;" in page


def test_nothing_is_loaded_and_only_our_own_script_may_run(experiment: Path) -> None:
    page = page_of(experiment)
    for name, found in Reader(page).elements:
        for key in found.keys() & {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}:
            assert key == "href" and found[key].startswith(("#", "runs/")), (name, found)
        assert name not in ("link", "iframe", "object", "embed", "base")
    style, script = asset("style.css"), asset("script.js")
    assert "url(" not in style and "@import" not in style and "</" not in style + script
    policy = next(found["content"] for _, found in Reader(page).elements if found.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and digest(style) in policy and digest(script) in policy and "unsafe" not in policy
    assert f"<style>{style}</style>" in page and f"<script>{script}</script>" in page


# ------------------------------------------------------------------------------------------------ states


def test_the_same_runs_give_the_same_bytes(experiment: Path) -> None:
    assert page_of(experiment) == page_of(experiment)


def test_troubles_are_explained(experiment: Path) -> None:
    health = page_of(experiment).split('<section id="health"')[1].split("</section>")[0]
    assert "erase: collapsed: 1 of 1, broken: format 0.12" in re.sub(r"<[^>]+>", "", health)
    assert "after 4 of 6 steps" in health and "the tripwire stopped it" in health and 'class="level"' in health
    assert "ValueError: bad" in health and "line 7" in health
    assert "Runs in no arm <small>1</small>" in page_of(experiment)


def test_an_experiment_without_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "x" / "runs" / "fresh").mkdir(parents=True)
    make_run(tmp_path / "x", config("vanilla", reward=REWARD), status={"state": "running"}, steps=2)
    write(tmp_path / "x")
    page = (tmp_path / "x" / PAGE).read_text()
    assert "No finished run yet" in page and "0 of 2 runs finished" in page and 'id="pareto"' not in page and "after 2 of 6 steps" in page


def test_watching_ends_when_nothing_is_left_to_wait_for(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = make_run(tmp_path / "x", config("vanilla", reward=REWARD), status={"state": "running"}, steps=2, trained={})
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(((tmp_path / "x" / PAGE).read_text(), seconds))
        (folder / "status.json").write_text('{"state": "failed", "error": "x"}')

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main([str(tmp_path / "x"), "--watch", "7"]) == 0
    ((page, seconds),) = seen
    assert seconds == 7 and '<meta http-equiv="refresh" content="7">' in page and "reloads every 7 s" in page
    assert 'http-equiv="refresh"' not in (tmp_path / "x" / PAGE).read_text() and "1 running" in capsys.readouterr().out


def test_an_interrupted_watch_leaves_a_final_page(tmp_path: Path, monkeypatch) -> None:
    make_run(tmp_path / "x", config("vanilla", reward=REWARD), status={"state": "running"}, steps=2)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert main([str(tmp_path / "x"), "--watch"]) == 0
    assert 'http-equiv="refresh"' not in (tmp_path / "x" / PAGE).read_text()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x"), "--watch", "0"])


# ------------------------------------------------------------------------------------------------ provenance and samples


def test_the_command_of_a_run_runs_it_again_to_the_bit(config, tmp_path: Path) -> None:  # the fixture, not test_report's
    first = run.run(config("arm=erase", f"output={tmp_path}/outputs", "experiment_name=first"))
    words = command(Path("outputs/first/runs") / first.name, read_run(first)).splitlines()
    assert words[0].startswith("git checkout ") and "git apply" not in words[0]
    again = "\n".join(line for line in words if not line.startswith("git ") and "git apply" not in line)
    done = subprocess.run(["bash", "-ec", again.replace("python ", f"{sys.executable} ", 1)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(CONF.parent)})
    assert done.returncode == 0, done.stderr
    for file in ("metrics.jsonl", "audit.jsonl", "rollouts.jsonl", "eval/as_deployed.json"):
        assert (tmp_path / "outputs/rerun/runs" / first.name / file).read_bytes() == (first / file).read_bytes()


def test_the_command_applies_what_was_not_committed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, config("vanilla", reward=REWARD), diff="diff --git a/x b/x")
    checkout, apply, *_ = command(folder, read_run(folder)).splitlines()
    assert checkout == "git checkout 0123456789abcdef" and apply.endswith(f"{folder}/provenance.json | git apply -")
    reader = apply.removesuffix(" | git apply -").replace("python", sys.executable, 1)
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True)
    assert done.stdout == "diff --git a/x b/x\n"


def test_samples_differ_and_hacks_come_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path, config("vanilla", reward=REWARD))
    solved, neither = {"hacked": False, "solved": True}, {"hacked": False, "reward": 0.25}
    (folder / "rollouts.jsonl").write_text("".join([
        rollout(0, "early", loophole="file_marker"), *(rollout(5, f"hack {i}") for i in range(5)), rollout(5, "y" * 5000, **solved),
        rollout(5, "no", **neither)]))
    chosen = choose(trained(folder, read_run(folder)))
    assert [(one.verdict, one.paid, one.held_out) for one in chosen] == [
        ("hacked", True, False), ("hacked", True, True), ("solved", True, False), ("neither", False, False)]
    assert chosen[0].completion == "hack 4" and chosen[2].text == "y" * LONGEST + "\n… 5000 characters"


# ------------------------------------------------------------------------------------------------ pictures


def test_a_line_breaks_where_nothing_was_measured() -> None:
    (curve,) = drawn(Line("x", "hack", [0.0, 1.0, None, 0.5]), 5)
    assert curve == '<path d="M0 100L25 0M75 50L75 50" class="line hack"/>'
    band, _ = drawn(Line("x", "hack", [0.5, 0.5], [0.25, 0.0], [0.75, 1.0]), 2)
    assert 'd="M0 25L100 0L100 100L0 75Z"' in band
    assert drawn(Line("x", "hack", [None]), 1) == []


def test_long_curves_are_thinned_to_their_ends() -> None:
    places = thinned(5000)
    assert len(places) == POINTS and (places[0], places[-1]) == (0, 4999) and thinned(3) == [0, 1, 2]


def test_ends_of_lines_do_not_overlap_and_text_is_escaped() -> None:
    picture = chart([Line("a", "hack", [0.02]), Line("b", "solve", [0.01]), Line("c", "held", [0.0])], "<label>", ("1", "2"))
    heights = [float(y) for y in re.findall(r'dx="15" y="([\d.]+)%"', picture)]
    assert len(heights) == 3 and min(b - a for a, b in zip(heights, heights[1:])) >= 12.9 and max(heights) <= 100  # noqa: RUF007
    assert 'aria-label="&lt;label&gt;"' in picture and [share(v) for v in (0.5, 0.996, None)] == [".50", "1.0", "–"]
    assert tag("a", "<", x="\"", y=None) == '<a x="&#34;">&lt;</a>'


def test_the_front_is_what_no_other_arm_beats(experiment: Path) -> None:
    found = points(read(experiment), "solve", "hack")
    assert next((point.entry.arm.label, point.x, point.y) for point in found if point.entry) == ("vanilla", 0.5, 0.875)
    best = front(found)
    assert [point.entry.arm.label for point in best] == ["route"], "the reference does not compete, and erase is broken"
    assert front([]) == [] and not any(point.entry is None for point in best)


def test_numbers_in_a_crowd_give_way() -> None:
    crowd = [Point(None, 0.5, 0.5, ())] * 30 + [Point(None, 0.2, 0.9, ())]
    found = spots(crowd)
    assert found[-1] is not None and None in found and len({spot for spot in found[:-1] if spot}) == len([s for s in found[:-1] if s])


def test_where_there_is_no_browser_the_tests_say_so(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="expected chromium or .* As root: apt-get install chromium"):
        chromium()
