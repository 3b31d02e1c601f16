"""Text completions and what is about them, through OpenAI's own client."""

import pytest

from gemma_mtp import Model, SamplingParams

from .conftest import Server

PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown"
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 5}


@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_completion_is_the_models_whole_or_streamed(demo_server: Server, demo: Model, settings: dict) -> None:
    expected = demo.generate(PROMPT, SamplingParams(max_tokens=24, **settings), "off")
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, **settings}
    for draft in ({}, {"draft": "off"}, {"draft": 4}, {"speculative.n_max": 2}):
        answer = demo_server.client.completions.create(**ask, extra_body=draft)
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].finish_reason == "length"
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (expected.stats.prompt_tokens, 24)
        details, timings = usage.completion_tokens_details, answer.timings
        assert details.accepted_prediction_tokens == timings["draft_n_accepted"]
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == timings["draft_n"]
        assert (timings["draft_n"] > 0) == (draft != {"draft": "off"})
        assert timings["prompt_n"] + timings["cache_n"] == usage.prompt_tokens
        assert timings["predicted_n"] == 24
        assert timings["predicted_per_second"] > 0
    chunks = list(demo_server.client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
    assert {chunk.choices[0].origin for chunk in chunks[:-2]} == {"target", "draft"}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 24)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_and_choices_come_in_order(demo_server: Server, demo: Model) -> None:
    prompts = ["One, two,", "Red, green,"]
    expected = [
        demo.generate(prompt, SamplingParams(max_tokens=5, temperature=1.0, seed=seed)).text
        for prompt in prompts
        for seed in (8, 9)  # the second choice has the next seed
    ]
    ask = {"model": "demo", "prompt": prompts, "n": 2, "max_tokens": 5, "temperature": 1.0, "seed": 8}
    answer = demo_server.client.completions.create(**ask)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    tokens = sum(len(demo.tokenize(prompt)) for prompt in prompts)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, 20)
    texts = [""] * 4
    for chunk in demo_server.client.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected
    ids = demo_server.client.completions.create(**ask | {"prompt": [demo.tokenize(text) for text in prompts]})
    assert [choice.text for choice in ids.choices] == expected


def test_penalties_and_biases_give_the_same_text_however_it_is_drafted(demo_server: Server, demo: Model) -> None:
    banned = demo.tokenize(" fox")[-1]
    settings = {"presence_penalty": 0.4, "frequency_penalty": 0.9, "logit_bias": {banned: -100}}
    for sampled in ({"temperature": 0}, SAMPLED):
        params = {**sampled, **settings}
        expected = demo.generate(PROMPT, SamplingParams(max_tokens=40, **params), "off")
        assert banned not in expected.tokens
        assert expected.text != demo.generate(PROMPT, SamplingParams(max_tokens=40, **sampled), "off").text
        for penalty in settings:
            without = SamplingParams(max_tokens=40, **{k: v for k, v in params.items() if k != penalty})
            assert penalty == "presence_penalty" or demo.generate(PROMPT, without).tokens != expected.tokens
        params["logit_bias"] = {str(banned): -100}
        for draft in ("auto", "off", 4):
            ask = {"model": "demo", "prompt": [PROMPT, "Once"], "max_tokens": 40, **params}
            answer = demo_server.client.completions.create(**ask, extra_body={"draft": draft})
            assert answer.choices[0].text == expected.text


def test_stop_strings_and_log_probabilities(demo_server: Server, demo: Model) -> None:
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    stopped = demo_server.client.completions.create(**ask, stop=["lazy"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text.endswith("over the ")
    expected = demo.generate(PROMPT, SamplingParams(max_tokens=24, logprobs=3))
    found = demo_server.client.completions.create(**ask, logprobs=3).choices[0].logprobs
    assert found.token_logprobs == [one.chosen for one in expected.logprobs]
    assert "".join(found.tokens) == expected.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(24)]
    assert all(len(top) == 3 for top in found.top_logprobs)
    streamed = demo_server.client.completions.create(**ask, logprobs=3, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset
    only_chosen = demo_server.client.completions.create(**ask, logprobs=0).choices[0].logprobs
    assert (only_chosen.token_logprobs, only_chosen.top_logprobs) == (found.token_logprobs, None)


def test_an_echo_starts_with_the_prompt(demo_server: Server, demo: Model) -> None:
    ask = {"model": "demo", "max_tokens": 6, "temperature": 0, "n": 2}
    prompts = [PROMPT, "One, two,"]
    plain = demo_server.client.completions.create(**ask, prompt=prompts).choices
    for given in (prompts, [demo.tokenize(prompt) for prompt in prompts]):
        echoed = demo_server.client.completions.create(**ask, prompt=given, echo=True)
        expected = [prompts[i // 2] + choice.text for i, choice in enumerate(plain)]
        assert [choice.text for choice in echoed.choices] == expected
        assert echoed.usage.completion_tokens == 24
        texts = [""] * 4
        for chunk in demo_server.client.completions.create(**ask, prompt=given, echo=True, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echo_has_the_log_probabilities_of_the_prompt(demo_server: Server, demo: Model, max_tokens: int) -> None:
    ids = demo.tokenize(PROMPT)
    params = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=True)
    expected = demo.generate(ids, params)
    values = [None, *(one.chosen for one in [*expected.prompt_logprobs, *expected.logprobs[:max_tokens]])]
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2, "echo": True}
    answer = demo_server.client.completions.create(**ask)
    (choice,) = answer.choices
    found = choice.logprobs
    assert answer.usage.completion_tokens == max_tokens
    assert found.token_logprobs == values
    assert found.top_logprobs[0] is None
    assert all(len(top) == 2 for top in found.top_logprobs[1:])
    assert found.tokens[0] == "<bos>"
    assert "".join(found.tokens[1:]) == choice.text
    assert found.text_offset == [0, *(len("".join(found.tokens[1:i])) for i in range(1, len(found.tokens)))]
    assert found.text_offset[len(ids) - 1] < len(PROMPT)
    streamed = [chunk.choices[0] for chunk in demo_server.client.completions.create(**ask, stream=True)]
    assert "".join(part.text for part in streamed) == choice.text
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [one for part in streamed if part.logprobs for one in getattr(part.logprobs, name)]
        assert joined == getattr(found, name)


def test_without_a_seed_texts_differ(demo_server: Server) -> None:
    ask = {"model": "demo", "prompt": "Once", "max_tokens": 12}
    assert len({demo_server.client.completions.create(**ask).choices[0].text for _ in range(3)}) > 1


def test_models_tokens_and_health(demo_server: Server, demo: Model) -> None:
    assert [model.id for model in demo_server.client.models.list()] == ["demo"]
    assert demo_server.client.models.retrieve("demo").max_model_len == demo.context
    ids = demo.tokenize("Hello, world")
    post = demo_server.http.post
    assert post("/tokenize", json={"prompt": "Hello, world"}).json()["tokens"] == ids
    assert post("/tokenize", json={"content": "Hello, world", "add_special_tokens": False}).json()["tokens"] == ids[1:]
    assert post("/detokenize", json={"tokens": ids[1:]}).json()["prompt"] == "Hello, world"
    assert demo_server.http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_metrics_count(demo_server: Server) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total", "spec_decode_num_drafts_total",
             "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
             "spec_decode_num_accepted_tokens_per_pos_total", "time_to_first_token_seconds_count",
             "inter_token_latency_seconds_count", "request_success_total"]  # fmt: skip
    before = [demo_server.metric(name) for name in names]
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    usage = demo_server.client.completions.create(**ask, extra_body={"draft": 4}).usage
    gained = [demo_server.metric(name) - old for name, old in zip(names, before, strict=True)]
    details = usage.completion_tokens_details
    drafted = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    accepted = details.accepted_prediction_tokens
    assert gained[:2] + gained[3:] == [usage.prompt_tokens, 24, drafted, accepted, accepted, 1, 23, 1]
    assert gained[2] >= drafted / 4
    assert demo_server.metric("num_requests_running") == demo_server.metric("num_requests_waiting") == 0
