"""Grammars with drafting on, on the real model: the output is the undrafted one, token by token, and obeys."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from gemma_mtp import AsyncEngine, Generation, Grammar, Model, SamplingParams, SettingsError

from ..scripted import write_scripted

PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Paris", "Berlin"]},
    },
    "required": ["full_name", "age", "city"],
    "additionalProperties": False,
}
NAMES = r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8}){1,3}\."
NUMBERS = 'start: "Results: " NUMBER ("," NUMBER){2,5}\nNUMBER: /[0-9]{1,3}/'
GRAMMARS = {
    "schema": Grammar.json_schema(PERSON),
    "regex": Grammar.regex(NAMES),
    "lark": Grammar.lark(NUMBERS),
    "choice": Grammar.choice(["It is\nso.", "It is not.", "Ée?"]),
}
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "seed": 3, "logprobs": 2},
    "unfiltered": {"temperature": 1.0, "seed": 5},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.5, "seed": 7},
}
PROMPT = "Here is a person, as JSON: "


def obeys(name: str, text: str) -> bool:
    if name == "schema":
        person = json.loads(text)
        return (
            list(person) == PERSON["required"]
            and len(person["full_name"]) <= 24
            and 0 <= person["age"] <= 120
            and person["city"] in ("Paris", "Berlin")
        )
    if name == "regex":
        return re.fullmatch(NAMES, text) is not None
    if name == "lark":
        return re.fullmatch(r"Results: \d{1,3}(,\d{1,3}){2,5}", text) is not None
    return text in ("It is\nso.", "It is not.", "Ée?")


def outcome(generation: Generation) -> tuple:
    return generation.tokens, generation.text, generation.logprobs, generation.finish_reason


@pytest.mark.parametrize("params", SETTINGS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_every_depth_gives_the_undrafted_output(demo: Model, name: str, params: str) -> None:
    asked = SamplingParams(max_tokens=80, grammar=GRAMMARS[name], **SETTINGS[params])
    plain = demo.generate(PROMPT, asked, "off")
    assert plain.finish_reason == "stop"
    assert obeys(name, plain.text), plain.text
    for draft in ("auto", 1, 4, 32):
        assert outcome(demo.generate(PROMPT, asked, draft)) == outcome(plain), draft


def test_forced_tokens_are_drafted_and_kept(demo: Model) -> None:
    line = "The quick brown fox jumps over the lazy dog; "
    asked = SamplingParams(max_tokens=80, grammar=Grammar.regex(re.escape(line) + "[0-9]"), temperature=1.0)
    plain, drafted = demo.generate(PROMPT, asked, "off"), demo.generate(PROMPT, asked)
    assert outcome(drafted) == outcome(plain)
    assert drafted.text.startswith(line)
    assert drafted.stats.rounds < len(plain.tokens) / 2
    assert drafted.stats.accepted == drafted.stats.drafted > 8


def test_what_only_one_token_may_be_costs_no_round_where_nothing_may_follow(demo: Model) -> None:
    generation = demo.generate(PROMPT, SamplingParams(max_tokens=80, grammar=Grammar.choice(["{"])))
    assert (generation.text, generation.finish_reason, len(generation.tokens)) == ("{", "stop", 1)


def test_stop_strings_and_max_tokens_end_it_early(demo: Model) -> None:
    grammar = Grammar.regex("(ab){50}")
    cut = demo.generate(PROMPT, SamplingParams(max_tokens=3, grammar=grammar))
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 3)
    stopped = demo.generate(PROMPT, SamplingParams(max_tokens=80, grammar=grammar, stop="baba"))
    assert (stopped.finish_reason, stopped.text) == ("stop", "a")


def test_the_models_own_end_may_come_where_the_grammar_does(demo: Model) -> None:
    generation = demo.generate("One. Two.", SamplingParams(max_tokens=40, grammar=Grammar.regex(r"[A-Za-z .\n]*")))
    assert re.fullmatch(r"[A-Za-z .\n]*", generation.text)


def test_grammars_in_one_batch_do_not_mix(demo: Model) -> None:
    asked = [
        SamplingParams(max_tokens=40, seed=i, temperature=1.0, grammar=grammar)
        for i, grammar in enumerate([*GRAMMARS.values(), None, *GRAMMARS.values(), None])
    ]

    async def whole(engine: AsyncEngine, params: SamplingParams) -> Generation:
        stream = engine.submit(PROMPT, params)
        async for _ in stream:
            pass
        return stream.generation

    async def together() -> list[Generation]:
        async with AsyncEngine(demo, parallel=10) as engine:
            return await asyncio.gather(*(whole(engine, params) for params in asked))

    for params, crowded in zip(asked, asyncio.run(together()), strict=True):
        assert outcome(crowded) == outcome(demo.generate(PROMPT, params, "off"))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.lark("start: missing"), "unknown name"),
        (Grammar.lark(""), "no start rule"),
        (Grammar.regex("["), "unclosed character class"),
        (Grammar.regex("a(?=b)"), "look-around"),
        (Grammar.json_schema({"type": "strange"}), "Invalid type"),
        (Grammar.json_schema({"$ref": "#/nowhere"}), "does not exist"),
        (Grammar.regex("\ud800"), "surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_grammar_that_is_none_is_refused_in_a_sentence(demo: Model, grammar: Grammar, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as refused:
        demo.generate(PROMPT, SamplingParams(grammar=grammar))
    assert str(refused.value).startswith("The grammar cannot be used: ")
    assert "\n" not in str(refused.value)


def test_without_llguidance_a_sentence_says_what_to_install(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(SettingsError, match="install it, or gemma-mtp with the extra 'server'"):
        demo.generate(PROMPT, SamplingParams(grammar=Grammar.json_object()))


@pytest.mark.usefixtures("one_torch_thread")
def test_pytorch_keeps_to_grammars_too(tmp_path: Path) -> None:
    folder = write_scripted(tmp_path / "scripted")
    grammar = Grammar.regex("Hello [a-z]{2,4}(, so it is){3}!")
    texts = set()
    for backend in ("torch", "native"):
        model = Model.load(folder, backend=backend, threads=1)
        for draft in ("off", "auto", 4):
            params = SamplingParams(max_tokens=60, grammar=grammar)
            texts.add((backend, model.generate("Say it.", params, draft).text))
    assert len(texts) == 2
    assert all(re.fullmatch("Hello [a-z]{2,4}(, so it is){3}!", text) for _, text in texts)
