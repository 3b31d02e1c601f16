"""Telling models from prompts, and reading --draft."""

import pytest

from gemma_mtp.cli.options import model_and_prompt, names_model, parse_draft
from gemma_mtp.errors import SettingsError


@pytest.mark.parametrize(
    "text", ["demo", "google/gemma-3-270m", "a/b:c-Q4_K_M.gguf", "missing.gguf", "x/y/z.safetensors"]
)
def test_these_name_a_model(text):
    assert names_model(text)


@pytest.mark.parametrize("text", ["", "Hello", "What is 1/2 of 8?", "a b/c", "/?", "demo.", "x" * 100_000, "nul\0"])
def test_these_are_prompts(text):
    assert not names_model(text)


def test_whatever_exists_names_a_model(tmp_path):
    assert names_model(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None, None, None), ("demo", None)),
        (("Hello", None, None, None), ("demo", "Hello")),
        (("demo", None, None, None), ("demo", None)),
        (("demo", "demo", None, None), ("demo", "demo")),
        (("any name", "Hello", None, None), ("any name", "Hello")),
        (("demo", None, "x.gguf", None), ("x.gguf", "demo")),
        (("any name", None, None, "Hello"), ("any name", "Hello")),
        ((None, None, "x.gguf", "Hello"), ("x.gguf", "Hello")),
    ],
)
def test_model_and_prompt(arguments, expected):
    assert model_and_prompt(*arguments) == expected


@pytest.mark.parametrize("arguments", [("a", "b", "c", None), ("a", "b", None, "d"), ("a", None, "c", "d")])
def test_what_is_given_twice_is_refused(arguments):
    with pytest.raises(SettingsError, match="given twice"):
        model_and_prompt(*arguments)


def test_draft():
    assert [parse_draft(text) for text in ("auto", "off", "0", "4")] == ["auto", "off", "off", 4]
    for text in ("", "-1", "fast", "1.5"):
        with pytest.raises(SettingsError, match="neither auto, off nor"):
            parse_draft(text)
