"""What the texts are made of that a drafter learns from."""

import numpy as np

from gemma_mtp.training.states import Recipe

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
    assert [number for number in range(240) if recipe.text(number, text, END)[0] == 1] == list(range(3, 240, 4))
