"""How many bits of an 8-bit output embedding must be read to be sure of the best tokens.

    python benchmarks/split_head.py [MODEL]          # default: the demo; the embedding must be Q8_0

For hidden states of mixed text: scores from the high bits of every code, how far they are off, the bound on that (the
norm of a row's remainder times the norm of the state), and the share of 16-row groups that hold a token which, by that
bound, can still be the best, or among the best 64. Those are read in full.
"""

import argparse

import numpy as np

from gemma_mtp import Model
from gemma_mtp.checkpoints.hub import resolve
from gemma_mtp.checkpoints.load import open_checkpoint
from gemma_mtp.prompts import NINE_KINDS

GROUP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="What the high bits of an output embedding tell.")
    parser.add_argument("model", nargs="?", default="demo")
    args = parser.parse_args()
    model = Model.load(args.model, drafter="none")
    hidden = model.hidden(model.tokenize("\n\n".join(NINE_KINDS.values()))[:500])[::12]
    tensor = open_checkpoint(resolve(args.model)).weights["embed"]
    vocab, width = tensor.shape
    blocks = tensor.data.reshape(vocab, width // 32, 34)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, :, 2:].view(np.int8).astype(np.float32)
    norms = np.linalg.norm(hidden, axis=1, keepdims=True)
    print("bits read first | mean error | mean bound | groups for the best | for the best 64")
    exact = hidden @ (codes * scales).reshape(vocab, width).T
    for bits in (4, 5, 6, 7):
        step = 2 ** (8 - bits)
        high = np.floor(codes / step) * step + (step - 1) / 2
        scores = hidden @ (high * scales).reshape(vocab, width).T
        bound = norms * np.linalg.norm((codes - high) * scales, axis=(1, 2))
        shares = []
        for best in (1, 64):
            threshold = np.partition(scores - bound, -best, axis=1)[:, -best, None]
            shares.append((scores + bound >= threshold).reshape(len(hidden), -1, GROUP).any(axis=2).mean())
        off = np.abs(exact - scores).mean()
        print(f"{bits:15} | {off:10.2f} | {bound.mean():10.2f} | {shares[0]:19.2%} | {shares[1]:15.2%}")


if __name__ == "__main__":
    main()
