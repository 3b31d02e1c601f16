"""Real servers, in processes of their own."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from ..scripted import write_scripted

KEY, OTHER_KEY = "sk-test", "sk-other"


class Server:
    """`gemma-mtp serve` on a free port."""

    def __init__(self, log: Path, *arguments: object):
        self._log = log
        with log.open("w") as out:
            command = [sys.executable, "-m", "gemma_mtp", "serve", *map(str, arguments), "--port", "0"]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while not (found := re.search(r"running on (http://\S+)", self.log)):
            assert self.process.poll() is None, self.log
            try:
                self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {KEY}"})
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"gemma_mtp:{name}[ {{]", line))

    def refusal(self, path: str, **request: object) -> tuple[int, dict]:
        answer = self.http.post(path, **request)  # type: ignore[arg-type]
        return answer.status_code, answer.json()["error"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.kill()
        return code

    def kill(self) -> None:
        """Ends it if it has not ended yet."""
        self.process.kill()
        self.process.wait()
        self.http.close()
        self.client.close()


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "demo", "--parallel", 4, "--max-queue", 4, "--api-key", KEY, "--max-body", 100_000)
    yield server
    server.stop()
    assert "Traceback" not in server.log


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model with Gemma 4's markup, which says its script by heart."""
    folder = write_scripted(tmp_path_factory.mktemp("models") / "scripted")
    keys = folder / "keys"
    keys.write_text(f"# keys\n{KEY}\n{OTHER_KEY}\n")
    options = ("--alias", "scripted", "--threads", 1, "--api-key-file", keys)
    server = Server(tmp_path_factory.mktemp("server") / "log", folder, *options)
    yield server
    server.stop()
    assert "Traceback" not in server.log
