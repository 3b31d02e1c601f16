from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp import _native
from gemma_mtp.decoding import PromptLookup
from gemma_mtp.decoding.drafting import Draft, Ends, GrowingDraft


def longest_repeated_suffix(text):
    """Length of the longest suffix that also ends before the end, and all the places where it ends."""
    best, ends = 0, []
    for end in range(1, len(text)):
        length = 0
        while length < end and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length > best:
            best, ends = length, [end]
        elif length == best and best:
            ends.append(end)
    return best, ends


def continuation(text, end, count):
    tokens = list(text)
    for i in range(count):
        tokens.append(tokens[end + i])
    return tokens[len(text) :]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=300, deadline=None)
def test_matches_equal_brute_force_after_every_token(text, cuts):
    lookup = _native.SuffixLookup()
    for i, token in enumerate(text):
        lookup.extend([token])
        length, ends = longest_repeated_suffix(text[: i + 1])
        assert lookup.match_length == length
        if length:
            assert lookup.match_end in ends
            assert lookup.continuation(7)[0] == continuation(text[: i + 1], lookup.match_end, 7)
        else:
            assert lookup.continuation(7) == ([], [])
    # The chunking of the text makes no difference.
    chunked = _native.SuffixLookup()
    edges = [0, *sorted(c for c in cuts if c <= len(text)), len(text)]
    for begin, end in pairwise(edges):
        chunked.extend(text[begin:end])
    assert (chunked.match_length, chunked.match_end, len(chunked)) == (
        lookup.match_length,
        lookup.match_end,
        len(text),
    )


@given(st.lists(st.integers(0, 30), max_size=120))
@settings(deadline=None)
def test_the_most_recent_occurrence_is_taken(text):
    lookup = _native.SuffixLookup()
    lookup.extend(text)
    length, ends = longest_repeated_suffix(text)
    if length:
        assert lookup.match_end == ends[-1]


def test_proposals_continue_a_repetition_past_the_end_of_the_text():
    lookup = PromptLookup()
    lookup.advance([7, 1, 2, 3, 1, 2, 3, 1])
    assert lookup.propose(8).tokens == [2, 3, 1, 2, 3, 1, 2, 3]


def test_what_followed_longer_strings_more_often_and_alone_is_surer():
    def first(*text):
        lookup = PromptLookup()
        lookup.advance(text)
        return lookup.propose(1).sureness[0]

    once = [first(1000, *range(length), 1001, *range(length)) for length in (1, 2, 3, 4, 8, 15, 16, 200)]
    assert once == [0, 2, 2, 3, 4, 4, 5, 5]
    twice = [first(*[*range(length), 1001] * 2, 1002, *range(length)) for length in (1, 2, 4, 8, 16)]
    assert twice == [4, 5, 6, 7, 7]
    otherwise = [first(*range(length), 1001, *range(length), 1002, *range(length)) for length in (1, 2, 4, 8, 16)]
    assert otherwise == [0, 0, 1, 1, 1]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=16))
@settings(max_examples=300, deadline=None)
def test_sureness_is_that_of_its_definition(text):
    """As far as the occurrence goes on in the text: how long the string is, what else followed it, and how often."""
    lookup = _native.SuffixLookup()
    lookup.extend(text)
    tokens, sureness = lookup.continuation(8)
    levels = {(0, True): (0, 0, 1, 1), (1, False): (0, 2, 3, 4), (2, False): (4, 5, 6, 7)}
    for i, token in enumerate(tokens[: len(text) - lookup.match_end]):
        string = [*text, *tokens[:i]][len(text) - lookup.match_length :]
        starts = range(len(text) - len(string))
        followed = [text[at + len(string)] for at in starts if text[at : at + len(string)] == string]
        assert token in followed
        alone = len(set(followed)) == 1
        table = levels[min(len(followed), 2) if alone else 0, not alone]
        assert sureness[i] == table[len(string).bit_length() - 1]


def test_an_empty_source_proposes_nothing():
    assert PromptLookup().propose(3) == Draft([], [])


def test_what_a_cut_leaves_out_is_still_known():
    draft = Draft([5, 6, 7], [3, 2, 1])
    assert draft.cut(1) == Draft([5], [3, 2], 6)
    assert draft.cut(3) == draft
    assert draft.cut(1).made == [5, 6]


def grown(depth, ends, *, tokens=range(10, 20), sureness=(3, 2, 1, 0, 3, 3, 3, 3, 3, 3)):
    growing = GrowingDraft(depth, ends)
    made = zip(tokens, sureness, strict=True)
    while growing.goes_on:
        growing.add(*next(made))
    return growing.draft


def test_a_draft_grows_to_its_depth():
    assert grown(3, None) == Draft([10, 11, 12], [3, 2, 1])
    assert grown(0, None) == Draft([], [])


def test_a_draft_ends_before_what_is_not_worth_a_row_or_a_step():
    acceptance = np.tile(np.array([0.1, 0.5, 0.5, 1.0], np.float32), (4, 1))  # together 1, 1/2, 1/4, 1/40
    never = np.zeros(4, np.float32)

    def at(place, least):
        changed = never.copy()
        changed[place] = least
        return changed

    assert grown(4, Ends(acceptance, never, never)) == Draft([10, 11, 12, 13], [3, 2, 1, 0])
    assert grown(4, Ends(acceptance, at(2, 0.25), never)).tokens == [10, 11, 12, 13]
    left_out = grown(4, Ends(acceptance, at(2, 0.26), never))
    assert left_out == Draft([10, 11], [3, 2, 1], 12)
    assert left_out.made == [10, 11, 12]
    assert grown(4, Ends(acceptance, never, at(2, 0.5))).tokens == [10, 11, 12, 13]
    assert grown(4, Ends(acceptance, never, at(2, 0.51))) == Draft([10, 11], [3, 2])  # the third is not even made
    assert grown(9, Ends(acceptance, never, never)).tokens == list(range(10, 19))  # beyond what the ends tell of
