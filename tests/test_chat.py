"""Conversations: the template's prompt, the channels of the answer, and where it ends."""

from pathlib import Path

import pytest

from gemma_mtp import Generation, Model, PromptError, SamplingParams, SettingsError
from gemma_mtp.checkpoints.hf_config import config_from_hf
from gemma_mtp.decoding.progress import Piece as DecodedPiece
from gemma_mtp.decoding.progress import TokenLogprobs
from gemma_mtp.engine.engine import Engine
from gemma_mtp.generation import Channels, Piece
from gemma_mtp.text.chat_parser import ToolCall

from .checkpoints.tiny import TARGETS, write_gguf
from .scripted import ANSWER, CALL, REASONING, SCRIPT, write_scripted
from .text.vocabulary import metadata, trained

QUESTION = {"role": "user", "content": "Please say it."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
LONG = SamplingParams(max_tokens=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.load(write_scripted(tmp_path_factory.mktemp("models") / "scripted"), threads=2)


def test_an_answer_has_its_reasoning_its_text_and_its_tool_calls_apart(model: Model) -> None:
    generation = model.generate([QUESTION], LONG, thinking=True)
    assert generation.reasoning == REASONING
    assert generation.text == ANSWER
    assert generation.tool_calls == [ToolCall(**CALL)]
    assert generation.finish_reason == "stop"  # by <turn|>, which the template alone says is an end
    assert model.detokenize(generation.tokens[-1:]) == ""
    assert model.generate([QUESTION], LONG).reasoning == ""  # the template closed the channel


@pytest.mark.parametrize("draft", ["off", 1, 4])
def test_pieces_say_their_channel_whatever_is_drafted(model: Model, draft: int | str) -> None:
    plain = model.generate([QUESTION], LONG, draft="off", thinking=True)
    said = plain.message() | {"content": f"<|channel>thought\n{REASONING}<channel|>{ANSWER}"}  # to be drafted
    stream = model.stream([QUESTION, said, QUESTION], SamplingParams(max_tokens=64, logprobs=1), draft, thinking=True)
    pieces = list(stream)
    generation = stream.generation
    assert generation.tokens == plain.tokens == [token for piece in pieces for token in piece.tokens]
    assert (generation.stats.accepted > 0) == (draft != "off")
    assert [piece.tool_call for piece in pieces if piece.tool_call] == generation.tool_calls == plain.tool_calls
    for channel, text in {"reasoning": REASONING, "content": ANSWER, "tool_call": ""}.items():
        assert "".join(piece.text for piece in pieces if piece.channel == channel) == text
    channels = [piece.channel for piece in pieces if piece.text or piece.tool_call]
    assert sorted(set(channels), key=channels.index) == ["reasoning", "content", "tool_call"]
    assert all(len(piece.logprobs or ()) == len(piece.tokens) for piece in pieces)
    assert len(generation.logprobs or ()) == len(generation.tokens)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_tokens_keep_their_order_between_calls(model: Model, together: int) -> None:
    asked = model.ask([QUESTION], LONG)
    assert asked.chat
    channels, call = Channels(asked.chat), f"<|tool_call>{''.join(SCRIPT[10:16])}<tool_call|>"
    tokens = model.tokenizer.encode(f"Hello{call}{call} you{call}", bos=False)
    pieces: list[Piece] = []
    for start in range(0, len(tokens), together):
        part = tokens[start : start + together]
        text = "".join(asked.chat.push(token) for token in part)
        logprobs = [TokenLogprobs(float(token), []) for token in part]
        pieces += channels.split(DecodedPiece(text, part, "draft", logprobs))
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert [int(logprob.chosen) for piece in pieces for logprob in piece.logprobs or ()] == tokens
    said = [piece.text or (piece.tool_call and "call") for piece in pieces]
    assert [part for part in said if part] == ["Hello", "call", "call", " you", "call"]


def test_a_stream_that_is_never_read_takes_nothing(model: Model) -> None:
    engine = model.engine
    assert isinstance(engine, Engine)
    for _ in range(3):
        stream = model.stream([QUESTION], LONG)
        stream.close()
        assert stream.generation.finish_reason == "cancelled"
    first = engine.create()
    engine.release(first)
    assert first.handle == 0


def test_an_answer_cut_short_keeps_all_that_was_said(model: Model) -> None:
    def cut(tokens: int) -> Generation:
        generation = model.generate([QUESTION], SamplingParams(max_tokens=tokens), thinking=True)
        assert generation.finish_reason == "length"
        return generation

    assert (cut(3).reasoning, cut(3).text) == ("Hmm,", "")
    assert (cut(6).reasoning, cut(6).text) == (REASONING, "Hello")
    unfinished = cut(10)
    assert (unfinished.text, unfinished.tool_calls) == (ANSWER + "<|tool_call>call:add{", [])


@pytest.mark.parametrize("draft", ["off", 4])
def test_stop_strings_are_looked_for_in_the_answer_alone(model: Model, draft: int | str) -> None:
    params = SamplingParams(max_tokens=64, stop=["so", "thought", "re y"])
    history = [QUESTION, {"role": "assistant", "content": f"{ANSWER}<|tool_call>"}, QUESTION]
    for messages in ([QUESTION], history):
        generation = model.generate(messages, params, draft, thinking=True)
        assert (generation.reasoning, generation.text) == (REASONING, "Hello the")
        assert (generation.finish_reason, generation.tool_calls) == ("stop", [])
        assert model.detokenize(generation.tokens).endswith(" you")


def test_a_conversation_goes_on_with_the_message_of_an_answer(model: Model) -> None:
    message = model.generate([QUESTION], LONG, thinking=True).message()
    assert message["content"] == ANSWER
    assert message["reasoning_content"] == REASONING
    call = message["tool_calls"][0]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1, "b": "x y"}'}
    response = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
    first = model.generate([QUESTION], LONG).stats.prompt_tokens
    again = model.generate([QUESTION, message, response, QUESTION], LONG, tools=[TOOL])
    assert again.stats.prompt_tokens > 2 * first
    assert again.text == ANSWER


def test_a_prompt_of_text_is_continued_as_ever(model: Model) -> None:
    assert model.has_chat_template
    generation = model.generate("[x]", SamplingParams(max_tokens=8, ignore_eos=True))
    assert generation.text == f"<|channel>thought\n{REASONING}<channel|>{ANSWER}"  # control tokens only are left out
    assert (generation.reasoning, generation.tool_calls) == ("", [])
    assert model.generate(model.tokenize("[x]"), SamplingParams(max_tokens=8)).tokens == generation.tokens


def test_without_a_template_turns_are_plain(demo: Model) -> None:
    assert not demo.has_chat_template
    stream = demo.stream([QUESTION], SamplingParams(max_tokens=4))
    plain = "<start_of_turn>user\nPlease say it.<end_of_turn>\n<start_of_turn>model\n"
    assert stream.generation.stats.prompt_tokens == len(demo.tokenize(plain))
    stream.close()


def test_a_gguf_brings_its_template(tmp_path: Path) -> None:
    config = config_from_hf(TARGETS["gemma3"] | {"vocab_size": len(trained()[0])})
    own = metadata("llama") | {"tokenizer.chat_template": "{{ bos_token }}<|turn>{{ messages[0].content }}"}
    write_gguf(tmp_path / "model.gguf", config, tokenizer=own)
    model = Model.load(tmp_path / "model.gguf")
    assert model.has_chat_template
    spelled = len(model.tokenize("<|turn>Please say it."))  # with <bos>
    assert model.generate([QUESTION], SamplingParams(max_tokens=1)).stats.prompt_tokens == spelled


def test_what_cannot_be_asked_is_one_sentence(model: Model, demo: Model) -> None:
    for options in ({"tools": [TOOL]}, {"thinking": True}):
        with pytest.raises(SettingsError, match="are for conversations"):
            model.stream("Hello", **options)  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="this model's chat template"):
            demo.stream([QUESTION], **options)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="role 'wizard'"):
        model.stream([{"role": "wizard", "content": "x"}])
    with pytest.raises(PromptError, match="holds no tokens"):
        model.stream([])
