"""Names of models, with a stand-in for the Hugging Face hub on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.errors import CheckpointError

from .tiny import DRAFTER, TARGETS, write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BIG = bytes(range(256)) * (12 << 12)  # 12 MiB: the library writes, and takes up again, pieces of 10
REPOSITORIES = {
    "o/single": {"README.md": b"hello", "model.gguf": BIG},
    "o/several": {"a-q4.gguf": b"4", "b-q8.gguf": b"8"},
    "o/split": {"m-00001-of-00002.gguf": b"1", "m-00002-of-00002.gguf": b"2", "other-00001-of-00002.gguf": b"3"},
    "o/folder": {"config.json": b"{}", "model.safetensors": b"w", "old.bin": b"no", "model.gguf": b"no"},
    "o/nothing": {"README.md": b"hello"},
    "o/damaged": {"model.gguf": b"GGUF damaged on its way"},
    "o/terms": {"model.gguf": b"gated, as most are: what it has is told, the files are not given"},
}


class Hub(ThreadingHTTPServer):
    """The few requests a download makes. `cut` says how often to break off the file of o/single after 11 MiB.

    GGUF files are stored as the hub stores large ones: what names them is their SHA-256.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut = 0
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(/.*)?", path):
            self.api(found[1], found[2] or "")
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.*)", path):
            self.file(found[1], found[2])
        else:
            self.reply(404)

    do_HEAD = do_GET

    def api(self, repo: str, rest: str) -> None:
        if repo == "o/gated":
            self.reply(403, X_Error_Code="GatedRepo")
        elif repo == "o/broken":
            self.reply(418)
        elif repo not in REPOSITORIES:
            self.reply(401, X_Error_Code="RepoNotFound")
        elif rest.startswith("/tree"):
            files = REPOSITORIES[repo].items()
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files]
            self.reply(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in REPOSITORIES[repo]]
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, repo: str, name: str) -> None:
        if repo == "o/terms":
            return self.reply(403, X_Error_Code="GatedRepo")
        data = REPOSITORIES[repo][name]
        digest = hashlib.sha256 if name.endswith(".gguf") else hashlib.sha1
        stored = data.replace(b"damaged", b"whole !") if repo == "o/damaged" else data
        headers = {"ETag": f'"{digest(stored).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if (part := self.headers.get("Range")) and self.command == "GET":
            self.server.ranges.append(part)
            start = int(part.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206, data[start:], **headers)
        elif self.command == "GET" and repo == "o/single" and self.server.cut:
            self.server.cut -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: 11 << 20])
            self.close_connection = True
        else:
            self.reply(200, data, **headers)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(home: Path, call: str, **environment: str) -> str:
    """What a call of hub.py returns or raises, in a process of its own, since the library reads its settings once."""
    code = (
        "from gemma_mtp.checkpoints.hub import *\nfrom gemma_mtp.errors import CheckpointError\n"
        f"try:\n    print({call})\nexcept CheckpointError as error:\n    print('error:', error)"
    )
    ran = python(home, "-c", code, **environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def python(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=kept | settings, check=False, timeout=120
    )


def pull(home: Path, hub: Hub, model: str) -> str:
    return run(home, f"pull({model!r})", HF_ENDPOINT=address(hub))


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_a_pulled_model_is_resolved_without_network(tmp_path: Path, hub: Hub) -> None:
    path = pull(tmp_path, hub, "o/single")
    assert Path(path).read_bytes() == BIG
    assert run(tmp_path, "resolve('o/single')", HF_HUB_OFFLINE="1") == path
    assert run(tmp_path, "resolve('o/single:model.gguf')", HF_HUB_OFFLINE="1") == path
    missing = run(tmp_path, "resolve('o/single:other.gguf')")
    assert missing.endswith("fetch it with `gemma-mtp pull o/single:other.gguf`.")


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path, hub: Hub) -> None:
    hub.cut, hub.ranges = 1, []
    path = pull(tmp_path, hub, "o/single")
    assert Path(path).read_bytes() == BIG
    assert hub.ranges == [f"bytes={10 << 20}-"]


def test_a_file_with_another_sha256_is_refused_and_removed(tmp_path: Path, hub: Hub) -> None:
    assert pull(tmp_path, hub, "o/damaged") == (
        "error: The file 'model.gguf' of 'o/damaged' was damaged on the way, as its SHA-256 shows, and has been "
        "removed: pull it again."
    )
    assert not any(file.is_file() for file in tmp_path.rglob("*.gguf"))
    assert run(tmp_path, "resolve('o/damaged')").endswith("fetch it with `gemma-mtp pull o/damaged`.")


def test_a_file_damaged_in_the_cache_is_found_by_the_next_pull(tmp_path: Path, hub: Hub) -> None:
    path = Path(pull(tmp_path, hub, "o/single"))
    with path.open("r+b") as file:
        file.write(b"!")
    assert "SHA-256" in pull(tmp_path, hub, "o/single")
    assert Path(pull(tmp_path, hub, "o/single")).read_bytes() == BIG


def test_the_token_of_the_environment_is_sent(tmp_path: Path, hub: Hub) -> None:
    hub.tokens.clear()
    run(tmp_path, "pull('o/folder')", HF_ENDPOINT=address(hub), HF_TOKEN="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


def test_the_command_says_where_the_model_is_and_how_to_run_it(tmp_path: Path, hub: Hub) -> None:
    write_gguf(tmp_path / "target.gguf", config_from_hf(TARGETS["gemma3"]))
    write_gguf(tmp_path / "drafter.gguf", config_from_hf(DRAFTER))
    for name in ("target", "drafter"):
        REPOSITORIES[f"o/{name}"] = {"model.gguf": (tmp_path / f"{name}.gguf").read_bytes()}
    done = python(tmp_path, "-m", "gemma_mtp", "pull", "o/target:model.gguf", HF_ENDPOINT=address(hub))
    assert done.returncode == 0
    path = Path(done.stdout.removesuffix("\n"))
    assert path.is_relative_to(tmp_path)
    assert path.read_bytes() == (tmp_path / "target.gguf").read_bytes()
    assert done.stderr == "Run it: gemma-mtp run o/target:model.gguf\n"
    done = python(tmp_path, "-m", "gemma_mtp", "pull", "o/drafter", HF_ENDPOINT=address(hub))
    assert done.stderr == f"Run it: gemma-mtp run TARGET --drafter {done.stdout}"


def test_the_command_says_what_went_wrong_in_one_sentence(tmp_path: Path, hub: Hub) -> None:
    for model, words in {"o/gated": "is gated", "o/absent": "is private", "../x": "nor is that a model's name"}.items():
        done = python(tmp_path, "-m", "gemma_mtp", "pull", model, HF_ENDPOINT=address(hub))
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.startswith("gemma-mtp: ")
        assert done.stderr.count("\n") == 1


def test_only_what_the_model_needs_is_fetched(tmp_path: Path, hub: Hub) -> None:
    folder = Path(pull(tmp_path, hub, "o/folder"))
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    first = Path(pull(tmp_path, hub, "o/split:m-00001-of-00002.gguf"))
    assert sorted(file.name for file in first.parent.iterdir()) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


@pytest.mark.parametrize(("model", "message"), [
    ("o/several", "'o/several' has several models: choose one as 'o/several:FILE' from 'a-q4.gguf', 'b-q8.gguf'."),
    ("o/several:c.gguf", "'o/several' has no file 'c.gguf'."),
    ("o/nothing", "'o/nothing' has neither GGUF files nor safetensors with a config.json."),
    ("o/gated", "'o/gated' is gated: accept its terms on https://huggingface.co/o/gated, "
     "then log in with `hf auth login` or set HF_TOKEN."),
    ("o/terms", "'o/terms' is gated: accept its terms on https://huggingface.co/o/terms, "
     "then log in with `hf auth login` or set HF_TOKEN."),
    ("o/absent", "There is no model 'o/absent' on the Hugging Face hub, or it is private and needs `hf auth login` "
     "or HF_TOKEN."),
    ("o/broken", "'o/broken' cannot be fetched: the Hugging Face hub answered with status 418."),
    ("../x", "There is no file or folder '../x', nor is that a model's name ('owner/name')."),
])  # fmt: skip
def test_why_a_model_cannot_be_fetched_is_said(tmp_path: Path, hub: Hub, model: str, message: str) -> None:
    assert pull(tmp_path, hub, model) == f"error: {message}"


def test_a_hub_out_of_reach_is_said(tmp_path: Path) -> None:
    message = "error: 'o/single' cannot be fetched: the Hugging Face hub is out of reach, or HF_HUB_OFFLINE is set."
    assert run(tmp_path, "pull('o/single')", HF_HUB_OFFLINE="1") == message
    assert run(tmp_path, "pull('o/single')", HF_ENDPOINT="http://127.0.0.1:9") == message


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(str(file)) == resolve(file) == file
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.gguf") == file


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "a/b/c", "/no/such/file", "a/b:", "a\n/b", "~nobody/x", "x" * 10_000]
)
def test_what_is_neither_a_path_nor_a_name_is_said(name: str) -> None:
    with pytest.raises(CheckpointError, match="There is no file or folder") as caught:
        resolve(name)
    assert str(caught.value).isprintable()
