"""The page at /, in a real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gemma_mtp import Model, SamplingParams

from .browser import CHROMEDRIVER, CHROMIUM, Browser
from .conftest import KEY, Server

PROMPT = "One, two, three, one, two, three, one, two,"
in_a_browser = pytest.mark.skipif(not (CHROMEDRIVER and CHROMIUM), reason="Chromium and its driver are not installed")


@pytest.fixture(params=[(1100, 800, False), (500, 800, True)], ids=["desktop", "dark and narrow"])
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
    browser.run(f"document.querySelector('#key').value = '{KEY}'; connect()")
    browser.wait_until(lambda: browser.text("#model") == "demo, drafts by gemma3-270m")
    assert browser.run("return document.querySelector('#mode').value") == "completion"
    browser.run("document.querySelector('#tokens').value = 40")
    browser.click("#show")
    browser.type("#text", PROMPT + "\ue007")
    browser.wait_until(lambda: "40 tokens" in browser.text(".model .note"))
    assert browser.text(".model .target, .model .draft") == expected
    assert browser.text(".model .draft")
    colours = browser.run(
        "return ['draft', 'target'].map(k => getComputedStyle(document.querySelector(`.model .${k}`)).backgroundColor)"
    )
    assert colours[0] != colours[1] == "rgba(0, 0, 0, 0)"
    assert "tokens/s" in browser.text("#speed")
    browser.click("#again")
    browser.wait_until(lambda: "40 tokens" in browser.text(".model .note"))
    assert browser.text(".model .target, .model .draft") == expected
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    folder = Path(os.environ.get("GMTP_SCREENSHOTS", tmp_path))
    browser.screenshot(folder / f"page-{request.node.callspec.id.replace(' ', '-')}.png")
    browser.run("document.querySelector('#tokens').value = 2000; document.querySelector('#temperature').value = 1")
    browser.type("#text", "Once upon a time\ue007")
    browser.wait_until(lambda: browser.text(".model:last-child .target"))
    browser.click("#stop")
    browser.wait_until(lambda: browser.text(".model:last-child .note") == "stopped")
    browser.wait_until(lambda: demo_server.http.get("/health").json()["running"] == 0)
    assert [line for line in browser.complaints() if "401" not in line] == []


def test_the_page_asks_nothing_of_other_servers(demo_server: Server) -> None:
    for path in ("/", "/page.css", "/page.js"):
        answer = httpx.get(demo_server.url + path)
        assert answer.status_code == 200
        assert "://" not in answer.text
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
