"""The page at /, in a real browser."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gemma_mtp import Model, SamplingParams
from gemma_mtp.server.page import PATHS

from .browser import CHROMEDRIVER, CHROMIUM, Browser
from .conftest import KEY, Server

ENTER, TAB, ESCAPE = "\ue007", "\ue004", "\ue00c"
PROMPT = "One, two, three, one, two, three, one, two,"
in_a_browser = pytest.mark.skipif(not (CHROMEDRIVER and CHROMIUM), reason="Chromium and its driver are not installed")


@pytest.fixture(params=[(1100, 800, False), (390, 844, True)], ids=["desktop", "dark phone"])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    browser = Browser(*request.param)
    yield browser
    browser.close()


@in_a_browser
def test_a_text_is_continued_with_its_drafts_shown(
    demo_server: Server, demo: Model, browser: Browser, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = demo.generate(PROMPT, SamplingParams(max_tokens=40)).text
    browser.open(demo_server.url)
    browser.wait_until(lambda: "key is needed" in browser.text("#model"))
    sign_in(browser)
    assert browser.run("return document.querySelector('#mode').value") == "completion"
    browser.run("document.querySelector('#tokens').value = 40")
    browser.click("#show")
    browser.type("#text", PROMPT + ENTER)
    browser.wait_until(lambda: "40 tokens" in browser.text("#log .model .note"))
    assert browser.text("#log .model .target, #log .model .draft") == expected
    assert browser.text("#log .model .draft")
    colours = browser.run(
        "return ['draft', 'target'].map(k => document.querySelector(`#log .model .${k}`))"
        ".map(e => getComputedStyle(e).backgroundColor)"
    )
    assert colours[0] != colours[1] == "rgba(0, 0, 0, 0)"
    assert "tokens/s" in browser.text("#plot figcaption .rate")
    assert "% of drafts kept" in browser.text("#plot figcaption .kept")
    points = browser.run("return [...document.querySelectorAll('#plot polyline')].map(line => line.points.length)")
    assert min(points) > 2
    browser.click("#again")
    browser.wait_until(lambda: "40 tokens" in browser.text("#log .model .note"))
    assert browser.text("#log .model .target, #log .model .draft") == expected
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    folder, name = Path(os.environ.get("GMTP_SCREENSHOTS", tmp_path)), request.node.callspec.id.replace(" ", "-")
    browser.screenshot(folder / f"page-{name}.png")
    browser.run("document.querySelector('#tokens').value = 2000; document.querySelector('#temperature').value = 1")
    browser.type("#text", "Once upon a time" + ENTER)
    browser.wait_until(lambda: browser.text("#log .model:last-child .target"))
    browser.type("#text", ESCAPE)
    browser.wait_until(lambda: browser.text("#log .model:last-child .note") == "stopped")
    browser.wait_until(lambda: demo_server.http.get("/health").json()["running"] == 0)
    assert [line for line in browser.complaints() if "401" not in line] == []


@in_a_browser
def test_a_race_says_that_the_texts_are_identical_and_which_was_faster(
    demo_server: Server, demo: Model, browser: Browser, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = demo.generate(PROMPT, SamplingParams(max_tokens=60))
    browser.open(demo_server.url)
    sign_in(browser)
    browser.run("document.querySelector('#tokens').value = 60; document.querySelector('#settings').open = false")
    browser.click("#show")
    browser.type("#to_race", ENTER)  # by keyboard
    browser.type("#text", PROMPT + ENTER)
    browser.wait_until(lambda: browser.text("#verdict"))
    verdict = re.fullmatch(
        r"The texts are identical: all 60 tokens were compared\. MTP decoded (\d+\.\d\d) times as fast\.",
        browser.text("#verdict"),
    )
    assert verdict, browser.text("#verdict")
    assert float(verdict[1]) > 0
    assert browser.text("#lane_off .turn") == browser.text("#lane_on .turn") == expected.text
    assert browser.text("#lane_off .draft") == ""
    assert browser.text("#lane_on .draft")
    assert "drafts kept" in browser.text("#lane_on .figures")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    folder, name = Path(os.environ.get("GMTP_SCREENSHOTS", tmp_path)), request.node.callspec.id.replace(" ", "-")
    browser.screenshot(folder / f"race-{name}.png")
    browser.click("#replay")
    browser.wait_until(lambda: browser.text(".figures").count("done after") == 2)
    assert browser.text("#lane_off .turn") == browser.text("#lane_on .turn") == expected.text
    assert [line for line in browser.complaints() if "401" not in line] == []


def sign_in(browser: Browser) -> None:
    browser.wait_until(lambda: "key is needed" in browser.text("#model"))
    browser.type("#key", KEY + TAB)
    browser.wait_until(lambda: browser.text("#model") == "demo, drafts by gemma3-270m")


def test_the_page_asks_nothing_of_other_servers(demo_server: Server) -> None:
    for path in PATHS:
        answer = httpx.get(demo_server.url + path)
        assert answer.status_code == 200
        assert "://" not in answer.text
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
