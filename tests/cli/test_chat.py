"""`gemma-mtp run` with a model that has a chat template."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_mtp import Generation
from gemma_mtp.cli.session import Continuation, Conversation
from gemma_mtp.text.chat_parser import ToolCall

from ..scripted import ANSWER, CALL, REASONING, SCRIPT, write_scripted

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("models") / "scripted")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_mtp", "run", *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_a_prompt_is_answered_and_reasoning_left_out_of_a_pipe(folder: Path) -> None:
    done = run(folder, "Say it.", "--thinking", "--system", "Be brief.")
    assert done.stdout == f"{ANSWER}\n{json.dumps(CALL)}\n"
    assert done.stderr.startswith(f"[{len(SCRIPT) - 1} tokens, ")


def test_json_has_reasoning_and_tool_calls_of_their_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    answers = [
        json.loads(run(folder, "Say it.", "--json", *more).stdout)
        for more in (["--thinking"], ["--system", "Be brief."], ["--tools", tmp_path / "tools.json"])
    ]
    assert [answer["reasoning"] for answer in answers] == [REASONING, "", ""]
    assert all((answer["text"], answer["tool_calls"]) == (ANSWER, [CALL]) for answer in answers)
    thinking, system, tools = (answer["stats"]["prompt_tokens"] for answer in answers)
    assert thinking < tools < system  # all of it is in the prompt


def on_a_terminal(typed: str, state: Path, *arguments: object) -> str:
    """What a terminal shows of `run` while `typed` is typed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gemma_mtp", "run", *map(str, arguments)]
    environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while block := os.read(ours, 4096):
                shown += block
    os.close(ours)
    assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_shows_reasoning_dimmed_before_the_answer(folder: Path, tmp_path: Path) -> None:
    shown = on_a_terminal("", tmp_path, folder, "Say it.", "--thinking")
    reasoning = "".join(f"\x1b[2m{part}\x1b[0m" for part in ("Hmm,", " so"))
    assert f"{reasoning}\n\n{ANSWER}\n{json.dumps(CALL)}\n" in shown


def test_a_session_with_a_template_is_a_conversation(folder: Path, tmp_path: Path) -> None:
    typed = "Hello\n/help\n/system Be brief.\nAgain\n/clear\n/nope\nOnce more\n/exit\n"
    shown = on_a_terminal(typed, tmp_path, folder)
    assert shown.count(f"{ANSWER}\n{json.dumps(CALL)}\n[") == 3
    assert "/system TEXT" in shown
    assert "There is no command /nope" in shown
    history = (tmp_path / "gemma-mtp" / "history").read_text().splitlines()
    assert history[0] == "Hello"


def test_raw_continues_and_so_does_a_model_without_a_template(folder: Path, tmp_path: Path) -> None:
    bare = write_scripted(tmp_path / "bare", template=None)
    done = run(folder, "[x]", "--raw", "-n", 8)
    assert done.stdout == f"<|channel>thought\n{REASONING}<channel|>{ANSWER}\n"
    assert run(bare, "[x]", "-n", 8).stdout == done.stdout
    assert "reasoning" not in json.loads(run(bare, "[x]", "-n", 8, "--json").stdout)


def test_what_cannot_be_asked_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[")
    for arguments, words in {
        ("--raw", "--thinking"): "are for a model with a chat template, without --raw",
        ("--tools", tmp_path / "none.json"): "none.json cannot be read: No such file",
        ("--tools", tmp_path / "object.json"): "has to hold a list of tools",
        ("--tools", tmp_path / "broken.json"): "is not JSON",
    }.items():
        done = run(folder, "Say it.", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_conversation_is_kept_as_messages() -> None:
    talk = Conversation("Be brief.")
    talk.keep("Hi", Generation(text="Yes?", reasoning="Hm", tool_calls=[ToolCall("f", {})]))
    roles = [message["role"] for message in talk.prompt("Bye")]  # type: ignore[union-attr]
    assert roles == ["system", "user", "assistant", "user"]
    talk.system = None
    talk.clear()
    assert talk.prompt("Hi") == [{"role": "user", "content": "Hi"}]


def test_a_continuation_is_one_text() -> None:
    talk = Continuation()
    talk.keep("One,", Generation(text=" two,"))
    assert talk.prompt("three") == "One, two,\nthree"
    talk.clear()
    assert talk.prompt("One") == "One"
