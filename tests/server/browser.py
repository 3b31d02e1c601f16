"""A headless Chromium, driven over WebDriver's plain HTTP."""

import base64
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

CHROMEDRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """width below 500, which a window cannot have: a phone's."""

    def __init__(self, width: int, height: int, dark: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert CHROMEDRIVER is not None
        self._driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.wait_until(self._is_up)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"]
        arguments += ["--force-dark-mode"] * dark
        options: dict[str, Any] = {"binary": CHROMIUM, "args": arguments}
        if width < 500:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        self._session = f"/session/{session['sessionId']}"

    def close(self) -> None:
        self._http.delete(self._session)
        self._http.close()
        self._driver.terminate()
        self._driver.wait()

    def open(self, url: str) -> None:
        self._post("url", {"url": url})

    def run(self, script: str) -> Any:
        return self._post("execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        return self.run(f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent).join('')")

    def click(self, selector: str) -> None:
        self._post(f"element/{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """As from a keyboard; '\ue007' is Enter."""
        self._post(f"element/{self._element(selector)}/value", {"text": text})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._http.get(f"{self._session}/screenshot").json()["value"]))

    def complaints(self) -> list[str]:
        """What the browser's console warns of."""
        entries = self._post("se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.05)

    def _is_up(self) -> bool:
        try:
            return self._http.get("/status").json()["value"]["ready"]
        except httpx.ConnectError:
            return False

    def _element(self, selector: str) -> str:
        return self._post("element", {"using": "css selector", "value": selector})[_ELEMENT]

    def _post(self, path: str, body: dict) -> Any:
        answer = self._http.post(f"{self._session}/{path}", json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer
