"""What docs/serving.md and docs/deploy/ tell to do."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from gemma_mtp.cli import app

from .conftest import KEY, Server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"


def test_the_dashboard_asks_for_metrics_that_there_are(demo_server: Server) -> None:
    demo_server.client.completions.create(model="demo", prompt="1, 2, 3, 4, 1, 2, 3, 4, 1", max_tokens=20)
    there = set(re.findall(r"^gemma_mtp:[\w:]+", demo_server.http.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"gemma_mtp:[\w:]+", query)}
    assert len(asked) > 10
    assert asked - there == set()
    assert all(query.count("(") == query.count(")") for query in queries)
    labels = {label for query in queries for label in re.findall(r"by \((\w+)\)", query)}
    assert labels == {"le", "position", "finished_reason"}


def test_the_service_starts_the_server_with_options_that_there_are() -> None:
    unit = (DEPLOY / "gemma-mtp.service").read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE))
    _, *arguments = shlex.split(settings["ExecStart"])
    options = served_with(arguments)
    assert (options["first"], options["host"], options["api_key_file"].name) == ("demo", "127.0.0.1", "keys")
    assert int(settings["TimeoutStopSec"]) > options["drain"]
    assert settings["DynamicUser"] == "yes"


def test_the_image_holds_what_it_needs_and_runs_as_nobody_special(demo_server: Server) -> None:
    steps = instructions(DEPLOY / "Dockerfile")
    starts = [place for place, (name, _) in enumerate(steps) if name == "FROM"]
    assert len(starts) == 2
    last = dict(steps[starts[1] :])
    assert last["USER"] not in ("root", "0")
    copied = [source for name, text in steps[: starts[1]] if name == "COPY" for source in text.split()[:-1]]
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in kept
    assert {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "native", "gemma_mtp"} == set(copied)
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    options = served_with(command[1:])
    assert (options["first"], options["host"], str(options["port"])) == ("demo", "0.0.0.0", last["EXPOSE"])
    check = json.loads(last["HEALTHCHECK"].split("CMD ", 1)[1])
    healthy = [part.replace("http://127.0.0.1:8000", demo_server.url) for part in check[1:]]
    subprocess.run([sys.executable, *healthy], check=True)
    sick = [part.replace(":8000/", ":9/") for part in check[1:]]
    assert subprocess.run([sys.executable, *sick], stderr=subprocess.DEVNULL, check=False).returncode


def test_the_guides_example_runs(demo_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code = (ROOT / "docs" / "serving.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("http://localhost:8000", demo_server.url).replace('"none"', repr(KEY)), {})
    assert re.search(r"\n\d+ tokens, \d+ a second\n$", capsys.readouterr().out)


def served_with(arguments: list[str]) -> dict:
    """The options of a `gemma-mtp` command line, which must be one of `serve`."""
    name, *rest = arguments
    assert name == "serve"
    commands = typer.main.get_command(app)
    return commands.commands["serve"].make_context("serve", rest).params  # type: ignore[attr-defined]


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each with what it says."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(name, text) for name, _, text in (line.partition(" ") for line in lines)]
