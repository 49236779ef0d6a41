"""Reports in a real browser: they draw, ask for nothing, can be read by all, on any screen and on paper."""

import itertools
import json

import pytest
from axe_playwright_python.sync_playwright import Axe

from export.report.format import resolved
from tests.pages.browser import CONTRASTS, shown

pytestmark = pytest.mark.browser
PAGES = ("everything", "compressed", "comparison")
LEAST_CONTRAST = 4.5


@pytest.mark.parametrize("name", PAGES)
def test_a_page_draws_all_its_plots_without_a_word_or_a_request(browser, pages, name):
    with shown(browser, pages[name]) as one:
        plots = one.page.locator("[data-plot]")
        assert plots.count() == {"everything": 6, "compressed": 6, "comparison": 4}[name]
        for plot in plots.all():
            assert plot.locator(".main-svg .trace").count() > 0
            marks = plot.locator(".points path, .point path").evaluate_all(
                "(paths) => paths.filter((path) => path.getBBox().width + path.getBBox().height > 0).length"
            )
            assert marks >= 2, plot.get_attribute("aria-label")
        assert one.said == []
        assert one.asked == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_in_both_colour_schemes(browser, pages, name, scheme):
    with shown(browser, pages[name], scheme=scheme) as one:
        one.page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
        contrasts = one.page.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert [text for text in contrasts if text[1] < LEAST_CONTRAST] == []
        grounds = {ground for _, _, _, ground in contrasts}
        assert ("rgb(20, 23, 26)" in grounds) == (scheme == "dark")


def test_plots_change_with_the_colour_scheme(browser, pages):
    with shown(browser, pages["everything"]) as one:
        labels = one.page.locator("[data-plot] .xtick text").first
        light = labels.evaluate("(text) => getComputedStyle(text).fill")
        one.page.emulate_media(color_scheme="dark")
        one.page.wait_for_function(
            "(light) => getComputedStyle(document.querySelector('[data-plot] .xtick text')).fill !== light", arg=light
        )
        assert one.said == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_phone(browser, pages, name, width):
    with shown(browser, pages[name], width=width) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") == width
        beyond = one.page.evaluate(
            """() => [...document.querySelectorAll("h1, h2, h3, p, li, dd, dt, summary, [data-plot] text")]
              .filter((one) => !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1)
              .map((one) => one.textContent)"""
        )
        assert beyond == []


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_to_mend(browser, pages, name):
    with shown(browser, pages[name], bypass_csp=True) as one:
        one.page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
        found = Axe().run(one.page).response["violations"]
        assert [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found] == []


@pytest.mark.parametrize("name", PAGES)
def test_headings_and_landmarks_lead_through_the_page(browser, pages, name):
    with shown(browser, pages[name]) as one:
        levels = one.page.locator("h1, h2, h3").evaluate_all("(all) => all.map((one) => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        for landmark in ("banner", "navigation", "main", "contentinfo"):
            assert one.page.get_by_role(landmark).count() == 1
        for plot in one.page.locator("[data-plot]").all():
            assert plot.get_attribute("role") == "img"
            assert len(plot.get_attribute("aria-label")) > 20
            assert one.page.locator(f"table#{plot.get_attribute('aria-details')}").count() == 1
        tables = one.page.locator("table")
        assert tables.count() == one.page.locator("table > caption").count() > 0
        assert one.page.locator("th:not([scope])").count() == 0


def test_the_keyboard_reaches_all_that_can_be_used_and_shows_where_it_is(browser, pages):
    with shown(browser, pages["everything"]) as one:
        wanted = one.page.locator("a[href], summary, [tabindex='0']").evaluate_all(
            "(all) => all.filter((one) => one.checkVisibility()).length"
        )
        seen = []
        for _ in range(wanted):
            one.page.keyboard.press("Tab")
            seen.append(
                one.page.evaluate(
                    """() => { const one = document.activeElement; return [one.textContent.trim().slice(0, 40),
                      getComputedStyle(one).outlineStyle, one.getBoundingClientRect().top >= 0]; }"""
                )
            )
        assert seen[0] == ["Skip to the content", "solid", True]
        assert wanted > 15
        assert all(outline == "solid" for _, outline, _ in seen), seen
        one.page.locator("summary").first.focus()
        one.page.keyboard.press("Enter")
        assert one.page.locator("details").first.evaluate("(one) => one.open")
        one.page.locator(".skip").focus()
        one.page.keyboard.press("Enter")
        assert one.page.evaluate("document.activeElement.id") == "content"


def test_paper_shows_what_is_folded_up_on_a_white_ground_and_nothing_to_click(browser, pages):
    with shown(browser, pages["everything"], scheme="dark") as one:
        one.page.emulate_media(media="print")
        assert not one.page.locator("nav").is_visible()
        assert not one.page.locator(".skip").is_visible()
        assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        one.page.wait_for_function(
            "getComputedStyle(document.querySelector('[data-plot] .xtick text')).fill === 'rgb(68, 68, 68)'"
        )
        heights = one.page.locator("details table").evaluate_all(
            "(all) => all.map((one) => one.getBoundingClientRect().height)"
        )
        assert all(height > 20 for height in heights)
        assert [text for text in one.page.evaluate(CONTRASTS) if text[1] < LEAST_CONTRAST] == []
        assert one.page.pdf().startswith(b"%PDF")


def test_the_figures_that_are_read_are_those_of_the_manifest(browser, pages, worked):
    facts = json.loads((worked.compressed / "manifest.json").read_text())
    with shown(browser, pages["compressed"]) as one:
        figures = one.page.locator("data[data-of]").evaluate_all(
            "(all) => all.map((one) => [one.dataset.of, one.value, one.textContent])"
        )
    assert len(figures) > 100
    for path, value, text in figures:
        assert json.loads(value) == resolved(facts, json.loads(path))
        assert text.strip()
