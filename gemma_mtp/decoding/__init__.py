"""Choosing tokens: sampling settings, draft sources, draft length, the draft-verify loop. Knows nothing of models."""

from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.drafting import DraftSource, PromptLookup
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.verification import Decoding, Piece, Rows, Target, TextStream, TokenLogprobs, accept

__all__ = [
    "AutoDepth",
    "Decoding",
    "DepthControl",
    "DraftSource",
    "FixedDepth",
    "Piece",
    "PromptLookup",
    "Rows",
    "SamplingParams",
    "Stats",
    "Target",
    "TextStream",
    "TokenLogprobs",
    "accept",
]
