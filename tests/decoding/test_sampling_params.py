import pytest

from gemma_mtp.decoding import SamplingParams
from gemma_mtp.errors import SettingsError


def test_defaults_are_greedy():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.stop, params.logprobs) == (64, 0.0, (), 0)


def test_stops_become_tuples_and_a_single_string_is_one_stop():
    assert SamplingParams(stop="end", stop_ids=[1, 2]).stop == ("end",)
    assert hash(SamplingParams(stop=["a", "b"], stop_ids=[1, 2])) == hash(
        SamplingParams(stop=("a", "b"), stop_ids=(1, 2))
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_ids", [-1]),
        ("stop_ids", ["a"]),
        ("logprobs", True),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", [5]),
        ("logprobs", -1),
    ],
)
def test_a_setting_out_of_range_is_one_sentence_that_names_it(name, value):
    with pytest.raises(SettingsError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"The sampling setting {name} is ")
    assert str(error.value).endswith(".")
