"""gemma-mtp bench on the demo, with two short prompts in the place of the nine."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from gemma_mtp.cli import app
from gemma_mtp.errors import SettingsError
from gemma_mtp.measuring import speed

KINDS = {"count": "One, two, three, one, two, three, one, two", "story": "The lighthouse keeper had not"}
MTP = ["bench", "--mtp", "--drafter", "none", "-n", "8", "-r", "1", "-t", "2"]


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NINE_KINDS", KINDS)


@pytest.mark.usefixtures("two_kinds")
def test_mtp_prints_a_line_for_each_kind_the_means_and_the_cost_curve() -> None:
    done = CliRunner().invoke(app, MTP)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].endswith("drafter prompt-lookup, 2 threads, 8 tokens of each text")
    for decoding in ("greedy", "sampled"):
        for kind in (*KINDS, "all"):
            assert sum(line.split()[:2] == [decoding, kind] for line in lines) == 1
    assert sum("geometric mean" in line for line in lines) == 2
    assert next(line for line in lines if line.startswith("rows of a pass")).split()[4:] == list("12345678")
    assert next(line for line in lines if line.startswith("C(T)/C(1)")).split()[1] == "1.00"
    assert "PROJECTION" not in done.output


@pytest.mark.usefixtures("two_kinds")
def test_mtp_as_json_and_as_a_picture_say_the_same(tmp_path: Path) -> None:
    picture = tmp_path / "out.svg"
    done = CliRunner().invoke(app, [*MTP, "--json", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [(row["decoding"], row["kind"]) for row in found["rows"]] == [
        (decoding, kind) for decoding in ("greedy", "sampled") for kind in KINDS
    ]
    assert all(row["same tokens"] for row in found["rows"])
    assert all(len(row["acceptance"]) == len(row["without loops"]) == 3 for row in found["rows"])
    assert list(found["pass_seconds"]) == list("12345678")
    assert found["draft_step_seconds"] is None
    greedy = [row["speed-up"] for row in found["rows"] if row["decoding"] == "greedy"]
    assert found["summary"]["greedy"]["worst speed-up"] == min(greedy)
    assert found["summary"]["greedy"]["mean speed-up"] == pytest.approx((greedy[0] * greedy[1]) ** 0.5)
    shown = [title.text for title in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}title")]
    for row in found["rows"]:
        assert f"{row['decoding']}, {row['kind']}: {row['speed-up']:.4g}" in shown
    for depth, rate in enumerate(found["summary"]["greedy"]["acceptance"], 1):
        tried = found["summary"]["greedy"]["tried"][depth - 1]
        assert tried == sum(row["tried"][depth - 1] for row in found["rows"] if row["decoding"] == "greedy")
        assert (f"greedy, {depth}: {rate:.4g}" in shown) == (tried > 0)
    over = found["pass_seconds"]["8"] / found["pass_seconds"]["1"]
    assert f"C(T)/C(1), 8: {over:.4g}" in shown


def test_a_long_text_slows_decoding_down() -> None:
    done = CliRunner().invoke(app, ["bench", "--json", "-r", "1", "-t", "2", "--after", "8", "--after", "3000"])
    assert done.exit_code == 0, done.output
    seconds = json.loads(done.output)["pass_seconds_after"]
    assert list(seconds) == ["8", "3000"]
    assert 0 < seconds["8"] < seconds["3000"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["bench", "-c", "512", "--after", "512"], "after 512 tokens does not fit the context of 512"),
        (["bench", "--plot", "out.svg"], "--plot is about what --mtp measures"),
        (["bench", "--project"], "--project is about what --mtp measures"),
        ([*MTP, "--project"], "give a model with a drafter"),
        ([*MTP, "--plot", "no-such-folder/out.svg"], "no folder no-such-folder"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(options: list[str], fault: str) -> None:
    done = CliRunner().invoke(app, options)
    assert isinstance(done.exception, SettingsError)
    assert fault in str(done.exception)
