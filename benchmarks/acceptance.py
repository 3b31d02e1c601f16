"""How many drafts of the demo's drafter, or of others for the demo, are right where text does not repeat itself.

    python benchmarks/acceptance.py [DRAFTER...]

On the nine kinds of prompt that `gemma-mtp bench --mtp` has, sampled with three seeds; on four more of each kind
(more_of_nine_kinds.json); and on 64 like those that the shipped drafter's trainings began with, which they were not
given (training/data.py: split). Prints acceptance at depths 1 to 3, and how many drafts of depth 1 there were.
"""

import argparse
import json
import random
from pathlib import Path

from gemma_mtp import Model, SamplingParams
from gemma_mtp.checkpoints.demo import DRAFTER
from gemma_mtp.prompts import NINE_KINDS
from gemma_mtp.training.data import read_texts, split
from gemma_mtp.training.evaluate import Acceptance, acceptance

MORE = Path(__file__).with_name("more_of_nine_kinds.json")
HELD_OUT = 64
LONGEST = 192  # tokens of a held-out prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Acceptance of drafters for the demo, loops left out.")
    parser.add_argument("drafters", nargs="*", default=["demo"], help="default: the demo's own")
    for drafter in parser.parse_args().drafters:
        model = Model.load("demo", drafter=drafter)
        _, held_out = split(read_texts([DRAFTER / "prompts.jsonl", DRAFTER / "prompts-long.jsonl"]))
        unseen = [model.tokenize(text.content)[:LONGEST] for text in held_out]
        random.Random(1).shuffle(unseen)
        nine = [model.tokenize(text) for text in NINE_KINDS.values()]
        more = [model.tokenize(text) for texts in json.loads(MORE.read_text("utf-8")).values() for text in texts]
        for name, prompts, tokens, seeds in (
            ("nine kinds", nine, 128, 3),
            ("more of them", more, 128, 1),
            ("held out", unseen[:HELD_OUT], 96, 1),
        ):
            show(drafter, f"{name}, greedy", acceptance(model, prompts, SamplingParams(max_tokens=tokens), loops=False))
            runs = [
                SamplingParams(max_tokens=tokens, temperature=1.0, top_k=64, top_p=0.95, seed=100 * seed)
                for seed in range(seeds)
            ]
            sampled = Acceptance.of_all([acceptance(model, prompts, params, loops=False) for params in runs])
            show(drafter, f"{name}, temperature 1", sampled)


def show(drafter: str, name: str, found: Acceptance) -> None:
    rates = " / ".join(f"{rate:.3f}" for rate in found.rates)
    print(f"{drafter}: {name:26} {rates}, {found.tried[0]} drafts", flush=True)


if __name__ == "__main__":
    main()
