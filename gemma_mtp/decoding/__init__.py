"""Choosing tokens: sampling settings, draft sources, draft length, the draft-verify loop. Knows nothing of models."""

from gemma_mtp.decoding.depth import AutoDepth, DepthControl, FixedDepth
from gemma_mtp.decoding.drafting import Draft, Drafting, DraftSource, Offer, PromptLookup, TrainedDrafter
from gemma_mtp.decoding.progress import Piece, Progress, Rows, TextStream, TokenLogprobs, Wanted, accept
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.decoding.stats import Stats
from gemma_mtp.decoding.verification import Target, draft_and_verify

__all__ = [
    "AutoDepth",
    "DepthControl",
    "Draft",
    "DraftSource",
    "Drafting",
    "FixedDepth",
    "Offer",
    "Piece",
    "Progress",
    "PromptLookup",
    "Rows",
    "SamplingParams",
    "Stats",
    "Target",
    "TextStream",
    "TokenLogprobs",
    "TrainedDrafter",
    "Wanted",
    "accept",
    "draft_and_verify",
]
