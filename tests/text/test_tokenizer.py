import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.errors import CheckpointError, PromptError
from gemma_mtp.text.tokenizer import Tokenizer

from .corpus import CORPUS
from .vocabulary import BYTES, CONTROL, USER_DEFINED, metadata, reference, trained

KINDS = ["llama", "gemma4"]
TOKENIZERS = {kind: Tokenizer.from_gguf(metadata(kind)) for kind in KINDS}
SIZE = len(trained()[0])

texts = st.text() | st.lists(
    st.sampled_from([text for text in CORPUS if len(text) < 80])
    | st.sampled_from(trained()[0])
    | st.sampled_from([" ", "  ", "\n", "\t", "a", "ab", "ha", "=", "▁", "<", "<|", "|>", ">", "[x"])
    | st.characters(codec="utf-8"),
    max_size=20,
).map("".join)  # fmt: skip
ids = st.lists(
    st.integers(0, SIZE - 1) | st.integers(len(CONTROL + USER_DEFINED), len(CONTROL + USER_DEFINED + BYTES) - 1),
    max_size=40,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parse_special", [True, False])
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_ids_are_those_of_the_library(kind, parse_special, text):
    library = reference(kind)
    library.encode_special_tokens = not parse_special
    expected = library.encode(text, add_special_tokens=False).ids
    assert TOKENIZERS[kind].encode(text, bos=False, parse_special=parse_special) == expected


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_decoding_gives_the_text_back(text):
    assert TOKENIZERS["llama"].decode(TOKENIZERS["llama"].encode(text, bos=False)) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(ids=ids, data=st.data())
def test_streamed_pieces_are_the_decoded_text(ids, data):
    tokenizer = TOKENIZERS["gemma4"]
    stream, pieces, at = tokenizer.stream(), [], 0
    while at < len(ids):
        count = data.draw(st.integers(1, 4))
        pieces.append(stream.push(ids[at : at + count]))
        at += count
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    raw = b"".join(tokenizer.token_bytes(id) for id in ids)
    assert tokenizer.decode(ids) == raw.decode(errors="replace")


def test_a_stream_never_gives_half_a_character():
    tokenizer = TOKENIZERS["llama"]
    llama = tokenizer.encode("🦙", bos=False)
    assert [tokenizer.token_text(id) for id in llama] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    stream = tokenizer.stream()
    assert [stream.push([id]) for id in llama] == ["", "", "", "🦙"]
    assert [stream.push([id]) for id in (*llama[:3], *llama)] == ["", "", "", "�", "", "", "🦙"]
    assert stream.push(llama[:2]) == ""
    assert stream.flush() == "�"
    assert stream.flush() == ""


def test_control_tokens_can_be_left_out_of_the_text():
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.encode("<|turn>hi<turn|><|channel>")
    assert tokenizer.decode(ids) == "<bos><|turn>hi<turn|><|channel>"
    assert tokenizer.decode(ids, skip_special=True) == "hi<|channel>"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_makes_a_control_token_unless_asked_to(kind):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("".join(CONTROL), bos=False, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.encode("".join(CONTROL), bos=False) == list(range(len(CONTROL)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=texts | st.sampled_from([" ", "\n", "  a", "\u2581", "<bos>", "the "]).map(lambda part: part * 99))
def test_no_token_stands_for_more_of_a_text_than_the_longest(kind, text):
    tokenizer = TOKENIZERS[kind]
    assert len(tokenizer.encode(text, bos=False)) * tokenizer.longest >= len(text)


def test_the_longest_added_token_wins():
    tokenizer = TOKENIZERS["llama"]
    assert [tokenizer.token_text(id) for id in tokenizer.encode("<turn|>>\n\n\n\n<|chan", bos=False)][:4] == [
        "<turn|>>", "\n\n\n", "\n", "<|ch"
    ]  # fmt: skip


def test_a_checkpoint_names_the_tokens_that_end_a_generation():
    assert TOKENIZERS["llama"].eos_ids == {1, 5}
    assert TOKENIZERS["llama"].bos_id == 2


def test_a_lone_surrogate_is_refused():
    with pytest.raises(PromptError, match=r"lone surrogate \(U\+D83E\) at character 3"):
        TOKENIZERS["llama"].encode("ab\ud83e")


@pytest.mark.parametrize("id", [-1, SIZE, 2**40])
def test_ids_outside_the_vocabulary_are_refused(id):
    with pytest.raises(PromptError, match=f"token {id} is outside the vocabulary of {SIZE} tokens"):
        TOKENIZERS["llama"].decode([5, id])


def changed(**values):
    """The vocabulary's keys with some changed, and those that are None left out."""
    keys = metadata("gemma4") | {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    return {key: value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"model": "gpt2"}, "kind 'gpt2', but only 'llama' and 'gemma4'"),
        ({"model": None}, "lacks the key 'tokenizer.ggml.model'"),
        ({"tokens": None}, "lacks the key 'tokenizer.ggml.tokens'"),
        ({"tokens": 7}, "'tokenizer.ggml.tokens' is not a list of texts"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' is not a list of texts"),
        ({"tokens": "text"}, "'tokenizer.ggml.tokens' is not a list of texts"),
        ({"model": np.arange(2)}, "but only 'llama' and 'gemma4'"),
        ({"tokens": []}, "not as many token types as tokens"),
        ({"tokens": [], "token_type": []}, "is not a list of whole numbers"),
        ({"tokens": ["a"], "token_type": [1]}, "a token for each of the 256 bytes"),
        ({"tokens": ["<0xGG>"], "token_type": [6]}, "not spelled as in '<0x0A>'"),
        ({"tokens": ["a" * 70000], "token_type": [1]}, "more than 65535 bytes"),
        ({"token_type": "x"}, "is not a list of whole numbers"),
        ({"merges": None}, "lacks the key 'tokenizer.ggml.merges'"),
        ({"merges": []}, "'tokenizer.ggml.merges' is empty"),
        ({"tokens": [" " * 30000], "token_type": [4]}, "more than 65535 bytes"),
        ({"bos_token_id": "2"}, "'tokenizer.ggml.bos_token_id' is not a whole number"),
        ({"eos_token_id": SIZE}, f"names the token {SIZE}, but its vocabulary has {SIZE} tokens"),
        ({"eos_token_id": -1}, "names the token -1"),
        ({"add_space_prefix": True}, "puts a space before every text"),
        ({"add_space_prefix": np.arange(2)}, "'tokenizer.ggml.add_space_prefix' is neither true nor false"),
        ({"add_bos_token": "yes"}, "'tokenizer.ggml.add_bos_token' is neither true nor false"),
    ],
)
def test_a_damaged_vocabulary_is_one_sentence(damage, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        Tokenizer.from_gguf(changed(**damage))


@pytest.mark.parametrize("merge", ["", " ", "a", "a b c", "  ", "nowhere tobefound", "a\x00 b"])
def test_merges_that_make_no_token_do_nothing(merge):
    assert Tokenizer.from_gguf(changed(merges=[merge])).encode("abc", bos=False) == [
        trained()[0].index(character) for character in "abc"
    ]


@pytest.fixture
def folder(tmp_path):
    reference("gemma4").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<bos>"}, "pad_token": "<pad>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    return tmp_path


@pytest.mark.parametrize("parse_special", [True, False])
def test_a_hugging_face_folder_gives_the_same_tokenizer(folder, parse_special):
    ours, theirs = TOKENIZERS["gemma4"], Tokenizer.from_folder(folder)
    for name in ("vocab_size", "bos_id", "pad_id", "eos_ids", "special_ids", "added_ids"):
        assert getattr(ours, name) == getattr(theirs, name)
    for text in CORPUS:
        ids = ours.encode(text, parse_special=parse_special)
        assert theirs.encode(text, parse_special=parse_special) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    for outside in (SIZE, 2**32):
        with pytest.raises(PromptError, match="outside the vocabulary"):
            theirs.decode([outside])


def test_the_end_tokens_come_from_the_most_telling_file(folder):
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert Tokenizer.from_folder(folder).eos_ids == {5}
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>", "eos_token": "<eos>"}')
    assert Tokenizer.from_folder(folder).eos_ids == {1}


def test_a_damaged_folder_is_one_sentence(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json cannot be read as JSON"):
        Tokenizer.from_folder(folder)
    (folder / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        Tokenizer.from_folder(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="it has no byte tokens"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json does not exist"):
        Tokenizer.from_folder(folder)
