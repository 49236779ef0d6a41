"""Pages as a browser shows them: chromium without a window, and what it says of a page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """The chromium of this machine; without one the test is skipped, or fails under FLORA_REQUIRE_BROWSER=1."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = "no chromium is installed: apt-get install chromium"
        if os.environ.get("FLORA_REQUIRE_BROWSER") == "1":
            pytest.fail(f"FLORA_REQUIRE_BROWSER=1, and {reason}")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A page that was opened: what it said on the console, and what it asked for besides itself."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def shown(browser: Browser, file: Path, *, width: int = 1280, scheme: str = "light", **more) -> Iterator[Shown]:
    """`file` in a window of that width and colour scheme, all plots drawn."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **more)
    result = Shown(page=context.new_page())
    result.page.on("console", lambda message: result.said.append(f"{message.type}: {message.text}"))
    result.page.on("pageerror", lambda error: result.said.append(f"error: {error}"))
    result.page.on("request", lambda request: result.asked.append(request.url))
    result.page.goto(file.as_uri())
    result.page.wait_for_function(
        "[...document.querySelectorAll('[data-plot]')].every((plot) => plot.querySelector('.main-svg'))"
    )
    result.asked.remove(file.as_uri())
    yield result
    context.close()


# Every text with its contrast: the colours of text and of what lies behind it, as the browser paints them.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const painted = (colour, behind) => {
    canvas.globalCompositeOperation = "copy";
    canvas.fillStyle = behind;
    canvas.fillRect(0, 0, 1, 1);
    canvas.globalCompositeOperation = "source-over";
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[0-9]+/g).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    if (!element) return "rgb(255, 255, 255)";
    return painted(getComputedStyle(element).backgroundColor, behind(element.parentElement));
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || element.closest("script, style, .unseen, .skip") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), ground = behind(element);
    const ink = painted(element instanceof SVGElement ? style.fill : style.color, ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    found.push([text, (light + 0.05) / (dark + 0.05), ink, ground]);
  }
  return found;
}"""
