"""The types that weights can be converted to, and which of them a matrix gets where its width does not fit."""

from __future__ import annotations

import logging
from typing import Literal, get_args

Dtype = Literal["as-is", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TYPES = DTYPES[1:]  # what `convert --type` takes

_BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q4_K": 256, "Q6_K": 256}  # 32 for all others
# What takes the place of a type whose blocks are too wide: the next better one with blocks of 32, then fp16.
_NARROWER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_UNQUANTISED = "F16"

_log = logging.getLogger("gemma_mtp")


class Fitting:
    """Chooses each matrix's type, and says in the log, once for each width, where it is not the one asked for.

    Rows are quantised in blocks. Where a row is not a multiple of the type's block, Q4_K (256 wide) becomes Q5_0 and
    Q6_K becomes Q8_0 (32 wide, and no less exact); where 32 does not divide it either, F16. llama.cpp does the same.
    """

    def __init__(self, dtype: str) -> None:
        self._wanted = dtype.upper()
        self._said: set[int] = set()

    def type_of(self, cols: int) -> str:
        """The GGUF type of a matrix with that many columns."""
        kind = self._wanted
        while cols % _BLOCK.get(kind, 32):
            kind = _NARROWER.get(kind, _UNQUANTISED)
        if kind != self._wanted and cols not in self._said:
            self._said.add(cols)
            fault = f"the type {self._wanted} needs a multiple of {_BLOCK.get(self._wanted, 32)}"
            _log.warning("Matrices of %d columns become %s, because %s.", cols, kind, fault)
        return kind
