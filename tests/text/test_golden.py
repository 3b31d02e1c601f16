"""The demo model's tokenizer against transformers."""

import json
from pathlib import Path

import pytest

from gemma_mtp.checkpoints.demo import demo_path
from gemma_mtp.checkpoints.gguf import GGUF
from gemma_mtp.text.tokenizer import Tokenizer

from .corpus import CORPUS

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(GGUF.open(demo_path()).metadata)


@pytest.mark.parametrize("index", range(len(CORPUS)), ids=lambda index: repr(CORPUS[index])[:30])
def test_ids_are_those_of_transformers(tokenizer, index):
    text = CORPUS[index]
    assert tokenizer.encode(text, bos=False) == GOLDEN["special"][index]
    assert tokenizer.encode(text, bos=False, parse_special=False) == GOLDEN["plain"][index]


def test_a_long_text_gives_the_ids_of_transformers_too(tokenizer):
    """Texts joined by a token that is always found whole have their ids joined."""
    newline = tokenizer.encode("\n", bos=False)
    texts = [index for index, text in enumerate(CORPUS) if text and "\n" not in (text[0], text[-1])]
    expected = [id for index in texts for id in GOLDEN["special"][index] + newline] * 20
    assert tokenizer.encode("".join(CORPUS[index] + "\n" for index in texts) * 20, bos=False) == expected


@pytest.mark.parametrize("text", CORPUS, ids=lambda text: repr(text)[:30])
def test_decoding_gives_the_text_back(tokenizer, text):
    spaces = text.replace("▁", " ")  # one spelling for both
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == spaces
    assert tokenizer.decode(tokenizer.encode(text, bos=False, parse_special=False)) == spaces


def test_the_vocabulary_says_what_is_special(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.pad_id) == (262144, 2, 0)
    assert tokenizer.eos_ids == {1}
    assert {tokenizer.token_text(id) for id in (0, 1, 2, 3, 4, 105, 106)} == {
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"
    }  # fmt: skip
    assert {0, 1, 2, 3, 4, 105, 106} <= tokenizer.special_ids < tokenizer.added_ids
    assert (tokenizer.token_text(506), tokenizer.token_bytes(506)) == ("▁the", b" the")
    assert tokenizer.token_bytes(139) == b"   "


def test_bos_is_added_unless_told_not_to(tokenizer):
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("a")[0] == 2
    assert tokenizer.encode("a")[1:] == tokenizer.encode("a", bos=False)


@pytest.mark.slow
def test_ids_are_those_of_transformers_now():
    """golden.json is what this version of transformers says."""
    transformers = pytest.importorskip("transformers")
    path = demo_path()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert [reference(text, add_special_tokens=False)["input_ids"] for text in CORPUS] == GOLDEN["special"]
