"""The report in a real Chromium: nothing wider than a phone, filter and search at work, no script but its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sevpeft.evaluation.report.page import rows_text, write_report
from sevpeft.recipe import Recipe
from tests.evaluation.test_report import ATTACK, line, write_comparison, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="chromium or chromedriver is not installed (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    # In a container there is neither a sandbox nor room in /dev/shm.
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with an attack and a very long word among its texts, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    texts = [
        {"question": "عِنْدي صُداعٌ شديد", "severity": "neutral"},
        {"question": "ألم في الصدر وضيق تنفس"},
        {"question": ATTACK + "س" * 300, "prediction": ATTACK + "w" * 300, "truncated": True},
    ]
    rows = [line(arm, f"q{at}", **text) for arm in ("adapter", "base") for at, text in enumerate(texts)]
    made = {"run": write_run(folder / "run", rows), "comparison": write_comparison(folder / "comparison")}
    sent = [line("adapter", "q0"), line("adapter", "q1", prediction="اذهب إلى الطوارئ الآن"), line("base", "q0")]
    made["disagreeing"] = write_run(folder / "disagreeing", [*sent, line("base", "q1")])
    return {name: write_report(path).path for name, path in made.items()}


def visit(browser: Any, page: Path, width: int, **media: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    features = [{"name": "prefers-color-scheme", "value": media.get("scheme", "light")}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media.get("media", ""), "features": features})
    browser.get(page.as_uri())


def shown(browser: Any) -> list[str]:
    return [case.find_element("css selector", ".id").text for case in browser.find_elements("css selector", ".case")
            if case.is_displayed()]  # fmt: skip


def test_nothing_is_wider_than_the_screen(browser: Any, pages: dict[str, Path]) -> None:
    for name, width, scheme in product(pages, (360, 1280), ("light", "dark")):
        visit(browser, pages[name], width, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)
        ink, paper = (
            browser.execute_script(f"return getComputedStyle(document.body).{color}")
            for color in ("color", "backgroundColor")
        )
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
        assert browser.find_element("css selector", "svg.forest").is_displayed()


def brightness(color: str) -> int:
    return sum(int(part) for part in color.strip("rgba()").split(",")[:3])


def test_no_script_of_a_text_runs_and_nothing_is_fetched(browser: Any, pages: dict[str, Path]) -> None:
    browser.get_log("browser")
    visit(browser, pages["run"], 1280)
    assert browser.get_log("browser") == []  # an alert would have stopped the visit, a fetch would be refused aloud
    fetched = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert fetched == 0
    assert ATTACK.split("<")[-1] in browser.find_element("id", "answers").text


def test_the_policy_stops_a_script_that_would_have_slipped_in(browser: Any, pages: dict[str, Path]) -> None:
    page = pages["run"].with_name("slipped.html")
    html = pages["run"].read_text(encoding="utf-8")
    page.write_text(html.replace("</main>", "<script>document.title = 'slipped'</script></main>"), encoding="utf-8")
    visit(browser, page, 1280)
    assert browser.title == "Run run"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_a_reader_filters_by_severity_and_by_what_answers_say(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.select import Select

    visit(browser, pages["run"], 390)
    assert shown(browser) == ["q1", "q2", "q0"]  # critical first
    severity, hit = Select(browser.find_element("id", "stratum")), Select(browser.find_element("id", "hit"))
    assert [option.text for option in severity.options] == ["all", "critical", "neutral"]
    severity.select_by_value("neutral")
    assert shown(browser) == ["q0"]
    assert browser.find_element("id", "count").text == "1 of 3 questions"
    severity.select_by_value("")
    hit.select_by_value("cut")
    assert shown(browser) == ["q2"]
    severity.select_by_value("neutral")
    assert shown(browser) == [] and browser.find_element("id", "nothing").is_displayed()


def test_a_reader_sees_only_where_trained_arms_disagree(browser: Any, pages: dict[str, Path]) -> None:
    for name, expected in (("disagreeing", ["q1"]), ("run", [])):
        visit(browser, pages[name], 390)
        browser.execute_script("document.getElementById('differ').click()")
        assert shown(browser) == expected, name


def test_search_finds_arabic_however_it_is_spelled(browser: Any, pages: dict[str, Path]) -> None:
    for typed, found in (("صداع", ["q0"]), ("الم  في", ["q1"]), ("Q2", ["q2"]), ("xyz", [])):
        visit(browser, pages["run"], 1280)
        browser.find_element("id", "search").send_keys(typed)
        assert shown(browser) == found, typed


def test_training_rows_can_be_read_on_a_phone_from_right_to_left(browser: Any, tmp_path: Path) -> None:
    pieces = [{"text": f"<start>user\nسؤال طويل {ATTACK}\n" + "س" * 300, "tokens": 9, "learned": False}]
    pieces += [{"text": "جواب<end>", "tokens": 2, "learned": True}]
    row = {"row": 7, "severity": "critical", "probabilities": [0.1, 0.2, 0.7], "weight": 1.5, "pieces": pieces}
    row |= {"words": "critical: نزيف; other: ورم", "cut": "كلمات", "lost_words": 1}
    about = {
        "recipe": Recipe(),
        "data": {"source": "x.csv", "severity": None},
        "weights": SimpleNamespace(consultations=1),
    }
    (tmp_path / "rows.html").write_text(rows_text([row], "rows.html.jinja", **about), encoding="utf-8")
    browser.get_log("browser")
    for width, scheme in product((360, 1280), ("light", "dark")):
        visit(browser, tmp_path / "rows.html", width, scheme=scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    marks, seen = (browser.find_elements("css selector", name) for name in (".case mark", ".seen"))
    assert [one.text for one in marks] == ["جواب<end>"] and ATTACK.split("<")[-1] in seen[0].text
    assert seen[0].value_of_css_property("direction") == "rtl", "although its first letters are Latin"
    assert browser.find_element("css selector", ".case s").text == "كلمات"


def test_arabic_runs_from_right_to_left_in_a_page_that_does_not(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["run"], 390)
    styles = browser.execute_script(
        "return Array.from(document.querySelectorAll('.question'), (one) => {"
        " const style = getComputedStyle(one); return [style.direction, style.textAlign]; })"
    )
    assert styles == [["rtl", "start"]] * 3
    assert browser.execute_script("return getComputedStyle(document.body).direction") == "ltr"


def test_paper_shows_the_tables_folded_on_screen_and_no_controls(browser: Any, pages: dict[str, Path]) -> None:
    visit(browser, pages["comparison"], 1280, media="print", scheme="dark")
    assert not browser.find_element("id", "filter").is_displayed()
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert brightness(paper) > 700
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") > 0
