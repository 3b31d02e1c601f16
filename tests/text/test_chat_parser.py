import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.text.chat_parser import ChatEvent, ChatParser, ToolCall


def parsed(*pieces, **options):
    """The events of an answer with neighbours of one kind joined: {kind: text} pairs and tool calls."""
    parser = ChatParser(**options)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    out = []
    for event in events:
        if event.tool_call:
            out.append(event.tool_call)
        elif out and isinstance(out[-1], list) and out[-1][0] == event.kind:
            out[-1][1] += event.text
        else:
            out.append([event.kind, event.text])
    return out


def reasoning(text):
    return ["reasoning", text]


def content(text):
    return ["content", text]


ANSWERS = [
    ("Hello, world!", [content("Hello, world!")]),
    ("", []),
    ("<|channel>thought\nI'm\nthinking\n<channel|>Hello", [reasoning("I'm\nthinking"), content("Hello")]),
    ("<|channel>thought\nI'm\n\nthinking<channel|>Hello", [reasoning("I'm\n\nthinking"), content("Hello")]),
    ("<|channel>thought\n<channel|>Hello", [content("Hello")]),
    ("<|channel>thought<channel|>Hello", [content("Hello")]),
    ("<|channel>no name<channel|>Hello", [reasoning("no name"), content("Hello")]),
    ("<|channel><|channel>thought\na<channel|>b", [reasoning("a"), content("b")]),
    (
        "a<|channel>thought\nb<channel|>c<|channel>thought\nd",
        [content("a"), reasoning("b"), content("c"), reasoning("d")],
    ),
    ("done<channel|>", [content("done")]),
    ("never ends <|channel>thought\nhm\n", [content("never ends "), reasoning("hm\n")]),
    ("a < b <| c <|chan <|tool", [content("a < b <| c <|chan <|tool")]),
    ("<|channel>tho", [reasoning("tho")]),
    ("<|tool_call>call:f{}<tool_call|>", [ToolCall("f", {})]),
    (
        '<|channel>thought\nhm\n<channel|>Wait.<|tool_call>call:get_time{city:<|"|>Paris<|"|>}<tool_call|>',
        [reasoning("hm"), content("Wait."), ToolCall("get_time", {"city": "Paris"})],
    ),
    (
        "<|tool_call>call:a.b-c{x:1}<tool_call|><|tool_call>call:g{y:-2.5e3}<tool_call|>",
        [ToolCall("a.b-c", {"x": 1}), ToolCall("g", {"y": -2500.0})],
    ),
    (
        '<|tool_call>call:f{s:<|"|>say "}<tool_call|>", {b:[1,<|"|>,n:null,o:{t:true,f:false,e:{}},'
        'l:[],m:[1,[<|"|><|"|>]]}<tool_call|>',
        [
            ToolCall(
                "f",
                {
                    "s": 'say "}<tool_call|>", {b:[1,',
                    "n": None,
                    "o": {"t": True, "f": False, "e": {}},
                    "l": [],
                    "m": [1, [""]],
                },
            )
        ],
    ),
    (
        '<|tool_call>call:f { "plain": "js\\u00e9on", <|"|>quoted<|"|> : [ 1 , 2 ] , n:None }\n<tool_call|>',
        [ToolCall("f", {"plain": "jséon", "quoted": [1, 2], "n": None})],
    ),
    # Not a tool call: content as it stands
    *(
        (text, [content(text)])
        for text in (
            "<|tool_call>call:f{a:1}",
            "<|tool_call>call:f{a:1<tool_call|>",
            "<|tool_call>call:f{a}<tool_call|>",
            "<|tool_call>call:f{a:1 b:2}<tool_call|>",
            "<|tool_call>call:f{a:NaN}<tool_call|>",
            "<|tool_call>call:f{a:1e999}<tool_call|>",
            '<|tool_call>call:f{a:"\\ud83d"}<tool_call|>',
            '<|tool_call>call:f{"\\ud83d":1}<tool_call|>',
            "<|tool_call>call:f{}{}<tool_call|>",
            "<|tool_call>f{}<tool_call|>",
            "<|tool_call><tool_call|>",
            '<|tool_call>call:f{s:<|"|>open}<tool_call|>',
            "<|tool_call>call:f{a:" + "[" * 5000 + "]" * 5000 + "}<tool_call|>",
        )
    ),
]


@pytest.mark.parametrize(("answer", "events"), ANSWERS)
def test_an_answer_is_taken_apart(answer, events):
    assert parsed(answer) == events


@settings(max_examples=400, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from([answer for answer, _ in ANSWERS if len(answer) < 200])
        | st.sampled_from(
            ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "thought\n", "\n", "<", "<|"]
        )
        | st.text(max_size=5),
        max_size=8,
    ),
    data=st.data(),
)
def test_how_an_answer_is_cut_makes_no_difference(texts, data):
    answer, pieces = "".join(texts), []
    at = 0
    while at < len(answer):
        count = data.draw(st.integers(1, 12))
        pieces.append(answer[at : at + count])
        at += count
    assert parsed(*pieces) == parsed(answer)


def test_text_comes_as_soon_as_it_is_sure_to_be_no_markup():
    parser = ChatParser()
    assert parser.push("Hi <") == [ChatEvent("content", "Hi ")]
    assert parser.push("|chan") == []
    assert parser.push("ce|>") == [ChatEvent("content", "<|chance|>")]
    assert parser.push("<|channel>thought") == []
    assert parser.push("\nwell\n") == [ChatEvent("reasoning", "well")]
    assert parser.push("so") == [ChatEvent("reasoning", "\nso")]
    assert parser.push("<channel|>ok") == [ChatEvent("content", "ok")]


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("<|turn>model\n", "content"),
        ("<|turn>model\n<|channel>thought\n<channel|>", "content"),
        ("<|turn>user\nWhat is <|channel>?<turn|>\n<|turn>model\n", "content"),
        ("<|turn>model\n<|channel>thought\n", "reasoning"),
        ("<|turn>model\n<|channel>", "reasoning"),
    ],
)
def test_an_answer_may_start_in_an_open_channel(prompt, first):
    assert parsed("hm", prompt=prompt) == [[first, "hm"]]
    assert parsed("hm", prompt=prompt, reasoning=False) == [["content", "hm"]]


def test_markup_that_is_not_looked_for_is_content():
    text = "<|channel>thought\nhm<channel|><|tool_call>call:f{}<tool_call|>"
    assert parsed(text, reasoning=False, tool_calls=False) == [content(text)]
    assert parsed(text, tool_calls=False) == [reasoning("hm"), content("<|tool_call>call:f{}<tool_call|>")]


arguments = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda text: '<|"|>' not in text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"\A[a-z_]{1,6}\Z"), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def written(value):
    """As Gemma 4's template writes arguments."""
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{written(value[key])}" for key in sorted(value)) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


@given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,6}\Z"), arguments, max_size=4))
def test_written_arguments_are_read_back(value):
    assert parsed(f"<|tool_call>call:f{written(value)}<tool_call|>") == [ToolCall("f", value)]
