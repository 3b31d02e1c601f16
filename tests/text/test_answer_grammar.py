"""Forced calls in Gemma 4's syntax: whatever a model says under the grammar, the parser reads a call that fits."""

import random

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from gemma_mtp.errors import SettingsError
from gemma_mtp.text.answer_grammar import answer_grammar
from gemma_mtp.text.chat_parser import ChatParser
from gemma_mtp.text.guidance import Guide
from gemma_mtp.text.tokenizer import Tokenizer

from .vocabulary import reference

MARKUP = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>']
WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["c", "f", 3, None, {"b": [1, "x"]}]},
        "place": {"$ref": "#/$defs/place"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "odd key:": {"type": ["boolean", "null"]},
        "extra": {"anyOf": [{"type": "number"}, {"const": "no"}]},
    },
    "required": ["place", "unit"],
    "$defs": {"place": {"type": "object", "properties": {"name": {"type": "string"}, "near": {"$ref": "#/$defs/place"}},
                        "required": ["name"]}},
}  # fmt: skip


def tool(name: str, parameters: object = None) -> dict:
    more = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **more}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    library = Library.from_str(reference("llama").to_str())
    library.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in MARKUP])
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def guide(tokenizer: Tokenizer) -> Guide:
    return Guide(tokenizer, tokenizer.vocab_size, [1], MARKUP)


def said(guide: Guide, tokenizer: Tokenizer, grammars: list, seed: int) -> str:
    """A text of tokens drawn from all that are allowed, the markup more often so that it ends."""
    choose, text = random.Random(seed), guide.constraint(grammars)
    ids: list[int] = []
    marks = {guide.token(mark) for mark in [*MARKUP, "}", "]", "1"]} | {1}
    while not text.ended:
        assert len(ids) < 3000
        forced = text.forced(1)
        _, masks = text.allow([])
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
        assert allowed
        assert not forced or allowed == forced
        closing = sorted(marks.intersection(allowed))
        ids.append(choose.choice(closing if closing and choose.random() < 0.7 else allowed))
        text.advance(ids[-1])
    return tokenizer.decode(token for token in ids if token != 1)


@pytest.mark.parametrize("seed", range(25))
def test_what_is_said_is_a_call_that_fits(guide: Guide, tokenizer: Tokenizer, seed: int) -> None:
    parser = ChatParser()
    tools = [tool("weather", WEATHER), tool("now")]
    grammars = answer_grammar(guide, parser, False, None, tools)
    events = [*parser.push(said(guide, tokenizer, grammars, seed)), *parser.flush()]
    assert {event.kind for event in events} == {"tool_call"}, events
    for event in events:
        call = event.tool_call
        assert call is not None
        if call.name == "now":
            continue
        assert call.name == "weather"
        arguments = call.arguments
        assert {"place", "unit"} <= set(arguments) <= {"unit", "place", "days", "odd key:", "extra"}
        assert arguments["unit"] in ["c", "f", 3, None, {"b": [1, "x"]}]
        assert all(isinstance(day, int) for day in arguments.get("days", []))
        assert arguments.get("odd key:") in (True, False, None)
        place = arguments["place"]
        while place is not None:
            assert isinstance(place["name"], str)
            assert set(place) <= {"name", "near"}
            place = place.get("near")


@pytest.mark.parametrize("seed", range(6))
def test_reasoning_comes_first_and_then_what_is_asked_for(guide: Guide, tokenizer: Tokenizer, seed: int) -> None:
    for prompt in ("", "<|channel>thought\n"):
        parser = ChatParser(prompt=prompt)
        answer = {"lark_grammar": 'start: "yes" | "no"'}
        grammars = answer_grammar(guide, parser, True, answer, [tool("now", {"properties": {}})])
        events = [*parser.push(said(guide, tokenizer, grammars, seed)), *parser.flush()]
        content = "".join(event.text for event in events if event.kind == "content")
        calls = [event.tool_call for event in events if event.tool_call]
        assert content in ("yes", "no") if not calls else content == ""
        assert all((call.name, call.arguments) == ("now", {}) for call in calls)


def test_what_cannot_be_forced_is_refused(guide: Guide, tokenizer: Tokenizer) -> None:
    def ask(name: str, parameters: object = None) -> None:
        guide.constraint(answer_grammar(guide, ChatParser(), False, None, [tool(name, parameters)]))

    with pytest.raises(SettingsError, match="has a space, a brace or a colon"):
        ask("a b")
    with pytest.raises(SettingsError, match="not a schema among them"):
        ask("f", {"properties": {"x": {"$ref": "#/nowhere"}}})
    nested: dict = {}
    for _ in range(100_000):
        nested = {"type": "array", "items": nested}
    with pytest.raises(SettingsError, match="nested too deeply"):
        ask("f", nested)
    branching: dict = {}
    for _ in range(40):
        branching = {"type": ["object", "array"], "properties": {"a": branching}, "items": branching}
    with pytest.raises(SettingsError, match="too large"):
        ask("f", branching)
    with pytest.raises(SettingsError, match="not finite"):
        ask("f", {"enum": [1, float("nan")]})


def test_what_is_no_schema_narrows_nothing_down(guide: Guide, tokenizer: Tokenizer) -> None:
    odd = {"type": ["object", "object", []], "properties": {"a": {"type": [[]]}}, "required": [[], {}, "a"]}
    parser = ChatParser()
    grammars = answer_grammar(guide, parser, False, None, [tool("f", odd)])
    events = [*parser.push(said(guide, tokenizer, grammars, 1)), *parser.flush()]
    call = events[0].tool_call
    assert call
    assert list(call.arguments) == ["a"]


def test_calls_need_a_vocabulary_with_their_markup(tokenizer: Tokenizer) -> None:
    plain = Guide(Tokenizer(tokenizer._encoder, special_ids=[], added_ids=[], eos_ids=[1], bos_id=2), 8, [1], [])
    plain.token = lambda text: None  # type: ignore[method-assign]
    with pytest.raises(SettingsError, match="has no token"):
        answer_grammar(plain, ChatParser(), False, None, [tool("f")])
