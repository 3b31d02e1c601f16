"""What the texts are made of that a drafter learns from."""

import numpy as np

from gemma_mtp import Model, SamplingParams
from gemma_mtp.engine.engine import Engine
from gemma_mtp.training.states import TOP, Recipe, write

END, LENGTH = 1, 64


def test_a_quarter_is_read_and_others_go_on_from_short_and_long_beginnings() -> None:
    recipe, text = Recipe(LENGTH, seed=3), np.arange(2, 2 + LENGTH)
    given = {number: recipe.text(number, text, END) for number in range(240)}
    assert [number for number, (count, _) in given.items() if count == LENGTH] == list(range(0, 240, 4))
    written = [(count, params.temperature, params.top_k) for count, params in given.values() if count < LENGTH]
    assert len(set(written)) == 2 * 3  # every way of choosing tokens after beginnings of both lengths, each as often
    assert {written.count(one) for one in written} == {30}
    assert {count for count, _, _ in written} == {LENGTH // 8, LENGTH // 2}
    assert len({params.seed for _, params in given.values()}) == 240


def test_a_beginning_ends_where_its_text_does() -> None:
    recipe, text = Recipe(LENGTH, seed=3), np.arange(2, 2 + LENGTH)
    text[20] = END
    assert {recipe.text(number, text, END)[0] for number in range(1, 240, 4)} == {LENGTH // 8, 20}
    text[0] = END  # of a window that no text begins: its first token is replaced
    assert {recipe.text(number, text, END)[0] for number in range(1, 240, 4)} == {LENGTH // 8, LENGTH // 2}


def test_a_third_of_what_is_written_can_come_from_nothing() -> None:
    recipe, text = Recipe(LENGTH, seed=3, from_nothing=True), np.arange(2, 2 + LENGTH)
    found = {number: recipe.text(number, text, END) for number in range(240)}
    unasked = [number for number, (count, _) in found.items() if count == 1]
    assert unasked == list(range(3, 240, 4))
    assert all(found[number][1].temperature == 1 for number in unasked)  # greedily they would all be one text


def test_a_greedy_text_goes_on_as_the_data_does_where_it_repeats_itself(demo: Model) -> None:
    engine, end = demo.engine, demo.engine.config.eos[0]
    assert isinstance(engine, Engine)
    beginning = demo.tokenize("One, two, three, one, two, three, one, two, three, one, two, three, one, two,")
    rest = [*demo.tokenize("The moon is made of")[1:], end, *demo.tokenize("What is the capital of France?")[1:]]
    texts = np.zeros((2, 256), np.int64)
    texts[:, : len(beginning)] = beginning
    texts[:, len(beginning) : len(beginning) + len(rest)] = rest
    greedy, sampled = (SamplingParams(temperature=of, seed=1, logprobs=TOP) for of in (0.0, 1.0))
    written = write(engine, texts, [(len(beginning), greedy), (len(beginning), sampled)])["tokens"].tolist()
    assert contains(written[0], rest[:5])
    assert contains(written[0], rest[5:])
    assert not contains(written[1], rest[:5])
    alone = beginning + demo.generate(beginning, SamplingParams(max_tokens=200, temperature=0)).tokens
    first = next(at for at, token in enumerate(alone) if token != written[0][at])
    assert written[0][first : first + 5] == rest[:5]


def contains(tokens: list[int], run: list[int]) -> bool:
    return any(tokens[at : at + len(run)] == run for at in range(len(tokens)))
