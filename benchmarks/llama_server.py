"""A llama-server of llama.cpp for the time of a `with` block, asked over HTTP."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path


def version(server: Path) -> str:
    said = subprocess.run([server, "--version"], capture_output=True, text=True)
    return (said.stdout + said.stderr).strip().splitlines()[0]


class LlamaServer:
    """llama-server on a free port, with one slot and a context of 1,024 tokens. options: more of the command line."""

    def __init__(self, server: Path, model: Path, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the server
        command = [server, "-m", model, "--port", str(port), "-c", "1024", "-np", "1", "--no-warmup", *options]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "LlamaServer":
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health"):
                    return self
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    self.log.seek(0)
                    sys.exit(self.log.read().decode(errors="replace")[-3000:] + "\nllama-server ended.")
                time.sleep(0.3)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def tokenize(self, text: str) -> list[int]:
        return self.ask("tokenize", content=text, add_special=True)["tokens"]

    def complete(self, ids: list[int], count: int, **settings: object) -> dict:
        """Goes on from tokens for `count` more, greedily unless the settings say otherwise."""
        how = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, **settings}
        return self.ask("completion", prompt=ids, n_predict=count, return_tokens=True, cache_prompt=False, **how)

    def ask(self, place: str, **content: object) -> dict:
        body = json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/{place}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
