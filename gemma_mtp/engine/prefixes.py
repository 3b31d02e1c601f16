"""Names for pages of the KV cache: one stands for all tokens up to the page's end."""

import hashlib
from collections.abc import Sequence

import numpy as np

PAGE = 64  # positions, as native/include/gmtp/layers.h has it


def page_names(tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
    """Of the full pages of `tokens` that come after those with the names `before`.

    A name is the SHA-256 of the name before it and the page's tokens, so nobody can make up a text that gets the pages
    of another one.
    """
    names: list[bytes] = []
    last = before[-1] if before else b""
    for page in range(len(before), len(tokens) // PAGE):
        last = hashlib.sha256(last + np.array(tokens[page * PAGE : (page + 1) * PAGE], "<i4").tobytes()).digest()
        names.append(last)
    return names
