"""`gemma-mtp batch`: files of requests, answered as the server answers them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mtp import Model, SamplingParams


def batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_mtp", "batch", *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def line(custom_id: str, url: str, **body: object) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


def test_every_request_has_an_answer_in_order(demo: Model, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    sampled = {"model": "demo", "max_tokens": 8, "temperature": 1.0, "seed": 4}
    messages = [{"role": "user", "content": "Hi"}]
    source.write_text(
        line("long", "/v1/completions", **sampled | {"max_tokens": 20}, prompt="Once")
        + line("several", "/v1/completions", **sampled, prompt=["One, two,", "Red, green,"] * 9)
        + "\n"
        + line("bad", "/v1/completions", **sampled | {"temperature": -1}, prompt="Once")
        + line("other", "/v1/chat/completions", **sampled | {"model": "gpt"}, messages=messages)
        + line("chat", "/v1/chat/completions", **sampled, messages=messages)
        + line("message", "/v1/messages", **sampled, messages=messages)
        + line("response", "/v1/responses", input="Hi", max_output_tokens=8, seed=4)
    )
    done = batch(source, target, "--parallel", 2, "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "5 of 7 requests were answered; the others have errors.\n"
    answers = [json.loads(text) for text in target.read_text().splitlines()]
    names = ["long", "several", "bad", "other", "chat", "message", "response"]
    assert [answer["custom_id"] for answer in answers] == names
    assert [answer["response"]["status_code"] for answer in answers] == [200, 200, 400, 404, 200, 200, 200]
    assert all(answer["error"] is None and answer["id"].startswith("batch_req_") for answer in answers)
    long, several, bad, _, chat, message, response = (answer["response"]["body"] for answer in answers)

    def text(prompt: object, tokens: int = 8) -> str:
        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=4)
        return demo.generate(prompt, params, "off").text  # type: ignore[arg-type]

    assert long["choices"][0]["text"] == text("Once", 20)
    assert [one["text"] for one in several["choices"]] == [text("One, two,"), text("Red, green,")] * 9
    assert "temperature" in bad["error"]["message"]
    assert chat["choices"][0]["message"]["content"] == message["content"][0]["text"] == text(messages)
    assert response["output"][0]["content"][0]["text"] == text(messages)
    assert answers[0]["response"]["request_id"] == long["id"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


GOOD = line("a", "/v1/completions", prompt="x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no requests"),
        ("{", "Line 1", ),
        (GOOD + "[]\n", "Line 2"),
        (GOOD + GOOD, "that of an earlier line"),
        (GOOD.replace("POST", "GET"), "'method' is not POST"),
        (GOOD.replace("/v1/completions", "/v1/embeddings"), "'url' is none of"),
        (GOOD.replace('{"prompt": "x"}', "7"), "no 'body'"),
        (line("a", "/v1/completions", prompt="x", stream=True), "asks for a stream"),
        ("[" * 100_000, "Line 1"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_file_that_is_none_of_requests_is_refused_whole(tmp_path: Path, content: str, words: str) -> None:
    from gemma_mtp.errors import SettingsError
    from gemma_mtp.server.batch import read_tasks

    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(SettingsError) as refused:
        read_tasks(path)
    assert words in str(refused.value)
    assert str(refused.value).endswith(".")


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    source, whole, target = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    settings = {"model": "demo", "max_tokens": 6, "temperature": 1.0, "seed": 4}
    source.write_text("".join(line(f"n{i}", "/v1/completions", **settings, prompt=f"{i}, ") for i in range(4)))
    assert batch(source, whole).returncode == 0
    first, second, third, _ = whole.read_text().splitlines(keepends=True)
    part = tmp_path / "out.jsonl.part"
    part.write_text(first + second + third[:40])

    refused = batch(source, target)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--resume" in refused.stderr
    done = batch(source, target, "--resume")
    assert (done.returncode, done.stderr) == (0, "4 of 4 requests were answered.\n")
    answers = [[json.loads(text) for text in path.read_text().splitlines()] for path in (whole, target)]
    assert answers[1][:2] == answers[0][:2]  # kept as they were
    texts = [[answer["response"]["body"]["choices"][0]["text"] for answer in of] for of in answers]
    assert texts[0] == texts[1]
    assert not part.exists()

    part.write_text(second)
    other = batch(source, target, "--resume", "--force")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "other requests" in other.stderr
    for damaged in ("[1]\n", '{"custom_id": "n0"}\n'):
        part.write_text(damaged)
        assert "cannot be read" in batch(source, target, "--resume", "--force").stderr


def test_answers_do_not_replace_what_is_there(tmp_path: Path) -> None:
    source, there = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(GOOD)
    there.write_text("precious")
    refusals = {there: "--force", source: "holds the requests", tmp_path: "is a folder", Path("/"): "folder"}
    for target, words in refusals.items():
        done = batch(source, target)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    assert there.read_text() == "precious"
    assert source.read_text() == GOOD
    assert batch(source, there, "--force").returncode == 0
    assert json.loads(there.read_text())["custom_id"] == "a"


def test_files_that_there_are_not_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(GOOD)
    for source, target in (("none.jsonl", "out.jsonl"), ("in.jsonl", "none/out.jsonl")):
        done = batch(tmp_path / source, tmp_path / target)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "none" in done.stderr
