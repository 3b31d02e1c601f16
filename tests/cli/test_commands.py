"""The command as its users run it: processes, exit codes, what goes to which stream."""

import io
import json
import os
import signal
import subprocess
import sys

from gemma_mtp.cli.run import read_file, read_standard_input

GEMMA_MTP = [sys.executable, "-m", "gemma_mtp"]
PROMPT = "One, two, three, one, two, three, one, two"


def command(*arguments, stdin=""):
    return subprocess.run([*GEMMA_MTP, *map(str, arguments)], input=stdin, capture_output=True, text=True)


def assert_one_sentence(done, *words):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gemma-mtp: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert str(word) in done.stderr


def test_inspect_counts_sizes_and_memory():
    done = command("inspect", "demo", "--json", "--ctx", 1000)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert (found["architecture"], found["role"], found["layers"]) == ("gemma3", "target", 18)
    assert found["parameters"] == 268_098_176
    assert found["attention"] == {"sliding 512": 15, "full": 3}
    assert found["types"]["Q5_0"]["tensors"] == 81
    # K and V of 256 values in fp16: 15 sliding layers keep 512 tokens, 3 full ones all 1,000.
    assert found["memory"]["kv cache"] == (15 * 512 + 3 * 1000) * 2 * 256 * 2


def test_inspect_reads_well():
    done = command("inspect", "demo")
    assert "Q5_0 x81" in done.stdout
    assert "KV cache of 32,768 tokens" in done.stdout


def test_inspect_cpu():
    found = json.loads(command("inspect", "--cpu", "--json").stdout)
    assert found["kernels"] == found["can run"][0]
    assert "portable" in found["can run"]


def test_input_errors_are_one_sentence(tmp_path):
    assert_one_sentence(command("inspect"), "--cpu")
    assert_one_sentence(command("inspect", tmp_path / "none.gguf"), "none.gguf", "no file or folder")
    assert_one_sentence(command("run", "-f", tmp_path / "none.txt"), "none.txt", "cannot be read")
    assert_one_sentence(command("run", ""), "The prompt is empty")
    assert_one_sentence(command("run", "-p", "a", "-f", "b"), "given twice")
    assert_one_sentence(command("run", "Hello", "--draft", "fast"), "'fast'")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    assert_one_sentence(command("run", "-f", tmp_path / "latin.txt"), "latin.txt", "UTF-8")
    assert_one_sentence(command("run", b"caf\xe9".decode(errors="surrogateescape")), "not UTF-8")
    for locale in ("C.UTF-8", "en_US.UTF-8", "POSIX"):
        done = subprocess.run(
            [*GEMMA_MTP, "run"], input=b"caf\xe9", capture_output=True, env=os.environ | {"LC_ALL": locale}
        )
        assert (done.returncode, done.stderr) == (2, b"gemma-mtp: Standard input is not UTF-8 text.\n")


def test_a_piped_prompt_is_that_of_a_file(monkeypatch, tmp_path):
    content = "caf\u00e9\r\nau lait\r\n".encode()
    (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "latin-1"))
    assert read_standard_input() == read_file(tmp_path / "prompt.txt", None) == "caf\u00e9\nau lait"


def test_what_an_encoding_lacks_is_replaced():
    done = subprocess.run(
        [*GEMMA_MTP, "run", "\u65e5\u672c", "-n", "3", "--temp", "0"],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


def test_a_full_disk_and_closed_streams_are_one_sentence():
    for shell, code, words in (
        ("run a -n 2 > /dev/full", 1, "No space left"),
        ("run <&-", 2, "Standard input is closed"),
    ):
        line = " ".join([*GEMMA_MTP, shell])
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == code
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_usage_errors_exit_with_2():
    assert command("run", "--no-such-option").returncode == 2
    assert command("bench", "--repeats", "0").returncode == 2


def test_run_gives_the_same_text_however_it_is_asked_and_drafted():
    plain = json.loads(command("run", PROMPT, "-n", 24, "--draft", "off", "--json").stdout)
    assert plain["stats"]["drafted"] == 0
    assert (len(plain["tokens"]), plain["finish_reason"]) == (24, "length")
    drafted = json.loads(command("run", "-m", "demo", "-p", PROMPT, "-n", 24, "--draft", "4", "--json").stdout)
    assert drafted["stats"]["accepted"] > 0
    assert drafted["tokens"] == plain["tokens"]
    streamed = command("run", "-n", 24, "-t", 1, stdin=PROMPT + "\n")
    assert streamed.stdout == plain["text"] + "\n"
    assert streamed.stderr.startswith("[24 tokens, ")


def test_show_drafts_colours_and_changes_nothing_else():
    plain = command("run", "demo", PROMPT, "-n", 24, "--draft", "4").stdout
    coloured = command("run", "demo", PROMPT, "-n", 24, "--draft", "4", "--show-drafts").stdout
    assert "\x1b[32m" in coloured
    assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


def start(*arguments):
    return subprocess.Popen(
        [*GEMMA_MTP, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=listen_to_interrupts,
    )


def listen_to_interrupts():
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_the_text_and_says_so():
    with start("run", PROMPT, "-n", "5000") as process:
        text = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
    assert process.returncode == 130
    assert (text + rest).endswith(b"\n")
    assert errors.count(b"\n") == 1
    assert b"cancelled" in errors


def test_a_reader_that_leaves_ends_the_run():
    with start("run", PROMPT, "-n", "5000") as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 1
    assert errors == b""


def test_settings_out_of_range_are_one_sentence():
    assert_one_sentence(command("run", PROMPT, "--top-p", "2"), "top_p", "2")
    assert_one_sentence(command("run", PROMPT, "--ctx", "40000"), "40000", "32768")
    assert_one_sentence(command("run", PROMPT * 50, "--ctx", "20"), "20")


def test_convert_writes_a_file_that_runs(tmp_path):
    out = tmp_path / "small.gguf"
    done = command("convert", "demo", out, "--type", "q4_k")
    assert done.stdout == f"{out}: {out.stat().st_size / 1e6:,.1f} MB\n"
    assert done.stderr == "Matrices of 640 columns become Q5_0, because the type Q4_K needs a multiple of 256.\n"
    converted = json.loads(command("run", out, PROMPT, "-n", 8, "--json").stdout)
    loaded = json.loads(command("run", "demo", PROMPT, "-n", 8, "--json", "--dtype", "q4_k").stdout)
    assert converted["tokens"] == loaded["tokens"]
    assert_one_sentence(command("convert", "demo", out), "exists already", "--force")
    assert_one_sentence(command("convert", "demo", out, "--type", "q9"), "'q9'", "q4_0")
    calibrated = command("convert", "demo", out, "--type", "q8_0", "--calibrate", "README.md", "--force")
    assert_one_sentence(calibrated, "--calibrate", "--type q4_0")
    missing = command("convert", "demo", out, "--type", "q4_0", "--calibrate", tmp_path / "none", "--force")
    assert_one_sentence(missing, "no data at", "none")
    assert_one_sentence(command("run", "Hello", "--dtype", "q9"), "'q9'", "as-is")
