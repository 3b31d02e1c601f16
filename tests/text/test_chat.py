import pytest

from gemma_mtp.errors import CheckpointError, PromptError
from gemma_mtp.text.chat import ChatTemplate
from gemma_mtp.text.tokenizer import Tokenizer

from .vocabulary import metadata

# Gemma 3's rules in short: roles alternate, the system's words start the first turn.
GEMMA_3 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set prefix, turns = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set prefix, turns = '', messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {{- '<|turn>' + message.role + '\n' + (prefix if loop.first else '') + message.content | trim + '<turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"""

# Gemma 4's in short: tools, reasoning, tool calls, and tools' answers inside the message that called them.
GEMMA_4 = """{{ bos_token }}
{%- if tools %}<|turn>system
{% for tool in tools %}<|tool>{{ tool.function.name }}{{ tool.function.parameters | tojson }}<tool|>{% endfor %}<turn|>
{% endif %}
{%- for message in messages %}
    {{- '<|turn>' + message.role + '\n' }}
    {%- if message.reasoning_content %}
        {{- '<|channel>thought\n' + message.reasoning_content + '\n<channel|>' }}
    {%- endif %}
    {%- for call in message.tool_calls %}
        {{- '<|tool_call>call:' + call.function.name + '{' }}
        {%- for key, value in call.function.arguments | dictsort %}{{ key + ':' + value | string }}{% endfor %}
        {{- '}<tool_call|>' }}
    {%- endfor %}
    {%- for response in message.tool_responses %}
        {{- '<|tool_response>' + response.name + ':' + response.response + '<tool_response|>' }}
    {%- endfor %}
    {{- message.content }}
    {%- if message.tool_calls and not message.tool_responses %}<|channel>
    {%- elif not message.tool_responses or message.content %}<turn|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not messages[-1].tool_responses %}<|turn>model
{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}
{%- endif %}"""

USER = {"role": "user", "content": " Hi "}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(metadata("gemma4"))


def test_a_template_writes_the_prompt():
    template = ChatTemplate(GEMMA_3, bos_token="<bos>")
    answer = {"role": "assistant", "content": "Yo"}
    system = {"role": "system", "content": "Be brief."}
    assert template.render([USER]) == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    assert template.render([USER, answer], add_generation_prompt=False) == (
        "<bos><|turn>user\nHi<turn|>\n<|turn>assistant\nYo<turn|>\n"
    )
    assert template.render([system, USER]).startswith("<bos><|turn>user\nBe brief.\n\nHi<turn|>")
    assert template.render([{**system, "role": "developer"}, USER]) == template.render([system, USER])


def test_without_a_template_turns_are_plain():
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]
    assert ChatTemplate.plain().render(messages) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    assert ChatTemplate.plain().render([USER, messages[0]]) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>user\nBe brief.<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert ChatTemplate.plain().render([USER], add_generation_prompt=False) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    )


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    template = ChatTemplate(GEMMA_3)
    assert template.render([{"role": "user", "content": parts}]) == template.render(
        [{"role": "user", "content": "Hello there"}]
    )


def test_tools_are_declared_called_and_answered():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": "<é>"}}}
    asked = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]}
    told = {"role": "tool", "tool_call_id": "c1", "content": "2"}
    template = ChatTemplate(GEMMA_4, bos_token="<bos>")
    start = (
        '<bos><|turn>system\n<|tool>add{"type": "object", "x": "<é>"}<tool|><turn|>\n'
        "<|turn>user\n Hi <turn|>\n<|turn>assistant\n<|channel>thought\nhm\n<channel|>"
        "<|tool_call>call:add{a:1}<tool_call|>"
    )
    assert template.render([USER, asked], tools=[tool], add_generation_prompt=False) == start + "<|channel>"
    response = "<|tool_response>add:2<tool_response|>"
    assert template.render([USER, asked, told], tools=[tool]) == start + response
    done = template.render([USER, asked, told, {"role": "assistant", "content": "It is 2."}], tools=[tool])
    assert done.startswith(start + response + "It is 2.<turn|>\n")


def test_thinking_is_an_option_of_the_template():
    template = ChatTemplate(GEMMA_4)
    assert template.render([USER]).endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert template.render([USER], enable_thinking=True).endswith("<|turn>model\n")


def test_the_template_says_what_ends_a_turn(tokenizer):
    named = lambda source: {tokenizer.token_text(id) for id in ChatTemplate(source).stop_ids(tokenizer)}  # noqa: E731
    assert named(GEMMA_3) == {"<eos>", "<turn|>"}
    assert named(GEMMA_4) == {"<eos>", "<turn|>", "<|channel>"}
    assert named("{{ messages[1].content }}") == {"<eos>", "<turn|>"}  # those of the checkpoint
    assert named("{{ raise_exception('no') }}") == {"<eos>", "<turn|>"}


def test_templates_have_the_helpers_they_expect():
    source = (
        "{% generation %}a{% endgeneration %}"
        "{% for x in [1, 2, 3] %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ {'b': '<', 'a': 'é'} | tojson(sort_keys=true) }}{{ extra }}{{ eos_token }}"
    )
    assert ChatTemplate(source, eos_token="<eos>").render([USER], extra="!") == 'a124{"a": "é", "b": "<"}!<eos>'


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], "Message 1 is not an object"),
        ([{"content": "hi"}], "Message 1 has the role None"),
        ([USER, {"role": "wizard", "content": "hi"}], "Message 2 has the role 'wizard'"),
        ([{"role": "user"}], "Message 1 has no content"),
        ([{"role": "user", "content": 7}], "Message 1 has no content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "Message 1 has a part that is not of the type 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "Message 1 has a part that is not"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "Message 2 has a tool call without the name"),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": 5}], "Message 2 has tool calls that are not"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "Message 2 calls 'f' with arguments that are not a JSON object",
        ),
        ([USER, USER], "does not take this conversation: Roles must alternate."),
    ],
)
def test_a_bad_conversation_is_one_sentence(messages, sentence):
    with pytest.raises(PromptError, match=sentence) as caught:
        ChatTemplate(GEMMA_3).render(messages)
    assert "\n" not in str(caught.value)


def test_a_bad_tool_is_one_sentence():
    with pytest.raises(PromptError, match="A tool is declared as"):
        ChatTemplate(GEMMA_4).render([USER], tools=[{"name": "add"}])


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("a\n{% if %}", CheckpointError, "has an error in line 2"),
        ("{{ messages.append(1) }}", CheckpointError, "what no template may do"),
        ("{{ ''.__class__.__mro__ }}", CheckpointError, "what no template may do"),
        ("{{ messages[0].name.x.y }}", PromptError, "cannot render this conversation"),
        ("{{ 1 / 0 }}", PromptError, "cannot render this conversation: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", PromptError, "cannot render this conversation"),
    ],
)
def test_a_bad_template_is_one_sentence(source, error, sentence):
    with pytest.raises(error, match=sentence):
        ChatTemplate(source).render([USER])


def test_a_template_comes_from_the_checkpoint(tokenizer, tmp_path):
    of_gguf = ChatTemplate.from_gguf({"tokenizer.chat_template": "{{ bos_token }}!"}, tokenizer)
    assert of_gguf.render([USER]) == "<bos>!"
    assert ChatTemplate.from_gguf({}, tokenizer).source == ChatTemplate.plain().source
    with pytest.raises(CheckpointError, match="not a text"):
        ChatTemplate.from_gguf({"tokenizer.chat_template": 7}, tokenizer)

    assert ChatTemplate.from_folder(tmp_path, tokenizer).source == ChatTemplate.plain().source
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert ChatTemplate.from_folder(tmp_path, tokenizer).source == "one"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": "two"}]}')
    assert ChatTemplate.from_folder(tmp_path, tokenizer).source == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert ChatTemplate.from_folder(tmp_path, tokenizer).source == "three"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate.from_folder(tmp_path, tokenizer)


def test_the_parser_looks_for_the_markup_that_the_template_writes():
    text = "<|channel>thought\nhm<channel|>Hi<|tool_call>call:f{}<tool_call|>"
    kinds = lambda source: [event.kind for event in ChatTemplate(source).parser().push(text)]  # noqa: E731
    assert kinds(GEMMA_4) == ["reasoning", "content", "tool_call"]
    assert kinds(GEMMA_3) == ["content"]
