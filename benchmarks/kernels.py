"""Speed of the matmul kernels: packed GB/s at one row, cost of T rows over one, and multiply-adds a second.

    python benchmarks/kernels.py [--types Q4_0 Q4_K] [--isas avx2] [--threads 2] [--rows 65536] [--cols 2048]

The default size is larger than any cache, and the read bandwidth measured in the same run is the ceiling. For the
kernels alone, keep the data in cache: --rows 512 --threads 1 --repeats 50 (the read figure is then the limit of the
reading loop, not of the cache).
"""

import argparse
import os

import numpy as np

from gemma_mtp import _native

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 16]


def random_bytes(weight_type: str, rows: int, cols: int) -> np.ndarray:
    """A tensor of random codes. Bytes above 0x7b become 0x2b, so that no fp16 scale is an infinity or NaN."""
    data = np.random.default_rng(0).integers(0, 256, rows * _native.file_row_bytes(weight_type, cols), dtype=np.uint8)
    data[(data & 0x7F) > 0x7B] = 0x2B
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(_native.WEIGHT_TYPES), choices=list(_native.WEIGHT_TYPES))
    parser.add_argument("--isas", nargs="+", default=_native.isas(), choices=_native.isas())
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=65536, help="outputs of the matrix (default 65536)")
    parser.add_argument("--cols", type=int, default=2048, help="inputs of the matrix (default 2048)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    args = parser.parse_args()

    print(f"{args.rows} x {args.cols}, {args.threads} threads; best of {args.repeats} rounds of 3")
    print("C(T)/C(1) for T =     " + "".join(f"{t:6}" for t in WIDTHS[1:]) + "   GMAC/s at T = 128")
    for weight_type in args.types:
        packed = _native.pack(weight_type, random_bytes(weight_type, args.rows, args.cols), args.rows, args.cols)
        for isa in args.isas:
            # In rounds, so that a slow moment of the machine hits all widths and the read alike.
            reads, *costs = zip(
                *[
                    [min(_native.time_read([packed.data], args.threads, 3))]
                    + [min(_native.time_matmul(packed, t, args.threads, isa, 3)) for t in WIDTHS]
                    for _ in range(args.repeats)
                ],
                strict=True,
            )
            read = packed.nbytes / min(reads) / 1e9
            cost = [min(c) for c in costs]
            prompt = min(_native.time_matmul(packed, 128, args.threads, isa, max(1, args.repeats // 5)))
            macs = 128 * args.rows * args.cols / prompt / 1e9
            ratios = "".join(f"{c / cost[0]:6.2f}" for c in cost[1:])
            speed = packed.nbytes / cost[0] / 1e9
            print(f"{weight_type:7}{isa:9}{ratios}{macs:8.0f}   T=1: {speed:5.1f} of {read:5.1f} GB/s", flush=True)


if __name__ == "__main__":
    main()
