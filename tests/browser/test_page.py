"""report.html as its reader has it: desk, phone and paper, in the dark, by keyboard, without scripts, with 300 runs and with none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_routing.analysis import analysed
from grpo_routing.html.material import read
from grpo_routing.html.page import write_page
from grpo_routing.report import write
from tests.test_html import experiment  # noqa: F401  (a fixture)
from tests.test_report import ROUTE, SVD, config, make_run
from tests.test_show import REWARD, rollout

pytestmark = pytest.mark.browser
SECONDS = 2.0  # of the page's own work until 300 runs are on the screen: CPU time, so that a busy machine changes nothing
PATIENCE = 60.0  # the same by the clock, on a machine that may be busy
ORDER = "rows => rows.map(row => row.dataset.arm + ' ' + row.dataset.policy)"
CONTRAST = """([words, behind]) => {
  const light = (node, key) => { const [r, g, b] = getComputedStyle(node)[key].match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const [a, b] = [light(document.querySelector(words), 'color'), light(document.querySelector(behind), 'backgroundColor')];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) }"""


def page_of(folder: Path, **options: object) -> Path:
    material = read(folder)
    return write_page(material, analysed(folder, material.runs), **options)


@pytest.fixture
def report(experiment: Path) -> Path:  # noqa: F811
    return page_of(experiment)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """60 arms of five seeds, half of them with two policies, 60 steps each, with completions."""
    root = tmp_path_factory.mktemp("crowded") / "crowded"
    wave = [(step * 7 % 60) / 60 for step in range(60)]
    for arm in range(60):
        settings = SVD | ROUTE if arm % 2 else SVD
        for seed in range(5):
            rates = {"hack": (arm + seed) / 65, "hack_known": arm / 60, "hack_held_out": (60 - arm) / 60, "solve": (arm * 17 % 60) / 60}
            folder = make_run(root, config(f"arm_number_{arm}", seed, reward=REWARD, trainer__steps=60, **settings), trained=rates,
                              deployed=rates | {"hack": 0.1} if arm % 2 else None, quarantine=float(arm % 2),
                              audit={"hack": wave, "solve": wave[::-1], "label_auroc_known": wave, "label_recall_known": wave})
            (folder / "scores.jsonl").write_text("")
            (folder / "rollouts.jsonl").write_text("".join(rollout(step, f"def answer_{step}(): pass\n" * 8) for step in range(8)))
    return page_of(root)


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("opened", [False, True])
def test_the_page_never_scrolls_sideways(visit: Callable, report: Path, width: int, opened: bool) -> None:
    page = visit(report, width)
    if opened:
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 360:
        assert page.evaluate("(box => box.scrollWidth > box.clientWidth)(document.querySelector('.wide'))"), "the table scrolls in its box"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(visit: Callable, report: Path, scheme: str) -> None:
    page = visit(report, color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(v => v < 60)")
    assert dark == (scheme == "dark")
    for words in ("body", ".standfirst", ".policy", "thead button", "nav a", "td small", "tbody th i"):
        assert page.evaluate(CONTRAST, [words, "body"]) >= 4.5, words
    assert len(page.screenshot()) > 10_000


def test_sorting_by_a_rate_puts_what_was_not_measured_last(visit: Callable, report: Path) -> None:
    page = visit(report)
    before = page.eval_on_selector_all("#ranked tr", ORDER)
    head = page.locator("#results thead th", has_text="known")
    for way in ("ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way and page.locator("#results thead [aria-sort]").count() == 1
        values = page.eval_on_selector_all("#ranked tr", "rows => rows.map(row => row.querySelectorAll('td[data-value]')[1].dataset.value)")
        measured = [float(value) for value in values if value]
        assert values[-2:] == ["", ""] and measured == sorted(measured, reverse=way == "descending")
    page.locator("[data-sort=number]").click()
    assert page.eval_on_selector_all("#ranked tr", ORDER) == before


def test_choosing_arms_acts_on_table_and_pictures(visit: Callable, report: Path) -> None:
    page = visit(report)
    assert page.locator("#shown").text_content() == "4 of 4 arms"
    page.locator("#find").fill("VAN illa")
    assert page.locator("#shown").text_content() == "1 of 4 arms"
    assert page.locator("#training figure:visible").count() == 1 and page.locator("#pareto .point[data-arm]:visible").count() == 1
    page.locator("#find").fill("")
    page.locator("button[data-kind=method]").click()
    assert page.locator("button[data-kind=method]").get_attribute("aria-pressed") == "false"
    assert page.locator("#ranked tr[data-kind=method]:visible").count() == 0 and page.locator("#ranked tr:visible").count() == 2
    page.locator("button[data-kind=method]").click()
    page.locator("button[data-policy=as_trained]").click()
    assert page.locator("#ranked tr[data-policy=as_trained]:visible").count() == 0 and page.locator("#ranked tr:visible").count() == 4


def test_the_keyboard_reaches_every_control(visit: Callable, report: Path) -> None:
    page = visit(report)
    focused = "document.activeElement.id || document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the results"
    assert page.evaluate("getComputedStyle(document.activeElement).left") == "0px", "it shows when it has the focus"
    page.keyboard.press("Enter")
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
        if seen[-1] == "hack":
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            page.keyboard.press("Enter")
            assert page.locator("#results thead th", has_text="hack").first.get_attribute("aria-sort") == "ascending"
        if seen[-1] == "How to read this":
            page.keyboard.press("Space")
            assert page.locator("#headline details").get_attribute("open") is not None
        if seen[-1] in seen[:-1] and seen[-1] == "find":
            break
    assert {"find", "vanilla GRPO", "as deployed", "arm", "seeds", "known", "held-out", "solve", "format"} <= set(seen)


def test_a_link_opens_what_it_points_to(visit: Callable, report: Path) -> None:
    page = visit(report)
    assert not page.locator("#arm-1 .run").first.is_visible()
    page.locator("#ranked a[href='#arm-1']").first.click()
    page.locator("#arm-1 .run").first.wait_for(state="visible")
    assert "git checkout 0123456789abcdef" in page.locator("#arm-1 code").all_text_contents()[1]


def test_pointing_at_a_name_shows_its_point(visit: Callable, report: Path) -> None:
    page = visit(report)
    page.locator("#pareto .names [data-arm='1']").first.hover()
    assert page.locator("#pareto .scatter.chosen .point.on").get_attribute("data-arm") == "1"


def test_what_a_model_wrote_does_not_run(visit: Callable, report: Path) -> None:
    page = visit(report)
    assert page.evaluate("typeof boom") == "undefined" and page.locator("img").count() == 0
    assert "<script>boom()</script>" in page.locator("#samples code").first.text_content()


def test_without_scripts_nothing_is_lost_but_the_controls(visit: Callable, report: Path) -> None:
    page = visit(report, java_script_enabled=False)
    assert page.locator("#ranked tr:visible").count() == 5 and page.locator("#pareto .point:visible").count() > 3
    assert page.locator(".filter").is_hidden() and page.locator("[data-copy]").first.is_hidden()


def test_reduced_motion_and_paper_are_respected(visit: Callable, report: Path) -> None:
    page = visit(report, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert page.evaluate("getComputedStyle(document.querySelector('.point')).transitionDuration") == "0s"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(".filter").is_hidden() and page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")


def test_three_hundred_runs_open_fast(visit: Callable, crowded: Path) -> None:
    assert crowded.stat().st_size < 4_000_000
    page = visit(crowded)
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    work = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    print(f"300 runs: {crowded.stat().st_size / 1e6:.2f} MB, load event after {took:.2f} s, {work:.2f} s of work for one load")
    assert page.locator("#ranked tr").count() == 90 and work <= SECONDS and took <= PATIENCE


def test_an_experiment_without_a_finished_run_opens(visit: Callable, tmp_path: Path) -> None:
    (tmp_path / "x" / "runs" / "fresh").mkdir(parents=True)
    write(tmp_path / "x")
    page = visit(tmp_path / "x" / "report.html", 360)
    assert page.locator("h2", has_text="No finished run yet").is_visible() and page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_watched_page_reloads_itself(visit: Callable, tmp_path: Path) -> None:
    make_run(tmp_path / "x", config("vanilla", reward=REWARD), status={"state": "running"}, steps=2)
    page = visit(page_of(tmp_path / "x", refresh=1))
    with page.expect_event("load", timeout=60_000):
        page.evaluate("window.first = true")
    assert page.evaluate("window.first") is None
