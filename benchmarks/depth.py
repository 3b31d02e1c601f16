"""Draft-length controls over recorded texts: what each would gain, without the noise of a clock.

    python benchmarks/depth.py [MODEL] [--drafter D] [--tokens N] [--seeds N]

What drafts propose at a place depends on the text alone, so one plain decoding that asks every source at every place
records all that any control could have met. Controls are then run over the record in simulated time: passes cost what
this machine's passes cost, measured first, and a drafted token what a step of the drafter does. Prints, for each kind
of prompt, the speed over plain decoding of fixed depths and of automatic drafting, with and without the drafter; and
how often tokens were right by how sure their source was (which decoding/acceptance.py starts from).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from gemma_mtp import Model, SamplingParams
from gemma_mtp.decoding import AutoDepth, DepthControl, Draft, FixedDepth, Offer, PromptLookup
from gemma_mtp.decoding.acceptance import DEPTHS, LEVELS
from gemma_mtp.decoding.depth import Round
from gemma_mtp.decoding.drafting import Ends, GrowingDraft
from gemma_mtp.decoding.economy import Alone
from gemma_mtp.decoding.progress import accept
from gemma_mtp.engine.cost_shape import measured_shape
from gemma_mtp.measuring.cost import measure_costs
from gemma_mtp.prompts import NINE_KINDS

MADE = 4  # tokens that the drafter is asked for at each place
SAMPLED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}


@dataclass(frozen=True)
class Place:
    """What may be drafted after one token of a text."""

    drafter: Draft | None
    lookup: Draft


@dataclass(frozen=True)
class Record:
    kind: str
    text: list[int]
    places: list[Place]  # one for each token of the text but the last


def record(model: Model, kind: str, params: SamplingParams) -> Record:
    engine, ids = model.engine, model.tokenize(NINE_KINDS[kind])
    lookup, sequence, places = PromptLookup(), engine.create(), []
    lookup.advance(ids)
    text = engine.step(sequence, ids, 1, params, len(ids)).tokens
    lookup.advance(text)
    while len(text) <= params.max_tokens:
        drafter = engine.draft(sequence, 0, text[-1], MADE, params) if engine.drafts else None
        places.append(Place(drafter, lookup.propose(DEPTHS)))
        text += engine.step(sequence, text[-1:], 1, params, len(ids)).tokens
        lookup.advance(text[-1:])
    engine.release(sequence)
    return Record(kind, text, places)


def ended(draft: Draft, depth: int, ends: Ends | None) -> Draft:
    """What the drafter would have made of a draft if it had been asked for this."""
    growing, made = GrowingDraft(depth, ends), zip(draft.made, draft.sureness, strict=True)
    while growing.goes_on and (step := next(made, None)) is not None:
        growing.add(*step)
    return growing.draft


def speed(record: Record, control: DepthControl, curve: list[float], step: float, drafter: bool, lookup: bool) -> float:
    """Tokens a second under a control. curve: seconds of passes of 1, 2, ... rows; step: of a step of the drafter."""
    at, seconds = 0, 0.0
    while at < len(record.places):
        place, coming = record.places[at], record.text[at + 1 :]
        offers: list[Offer] = []
        if drafter and place.drafter:
            offers.append(Offer("drafter"))
        if lookup and place.lookup.tokens:
            offers.append(Offer("lookup", place.lookup))
        if not offers:
            control.update(Round(None, 0, 0, 0, 0.0, curve[0]))
            seconds, at = seconds + curve[0], at + 1
            continue
        choice = control.choose(offers, min(len(coming) - 1, len(curve) - 1))
        taken = offers[choice.taken]
        if taken.draft is None and place.drafter:
            made = ended(place.drafter, choice.depth, choice.ends)
        else:
            made = place.lookup.cut(choice.depth)
        drafted = len(made.tokens)
        right = accept(made.made, coming[: drafted + 1])
        drafting = step * len(made.made) if taken.draft is None else 0.0
        done = Round(taken.source, choice.depth, drafted, right, drafting, curve[drafted], made.sureness)
        control.update(done)
        for other in offers:
            if other.draft and not (other is taken and choice.depth):
                told = other.draft.sureness[: 1 + done.accepted]
                control.observe(other.source, told, accept(other.draft.tokens[: len(told)], coming))
        seconds += drafting + curve[drafted]
        at += 1 + done.accepted
    return at / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args()
    model = Model.load(asked.model, drafter=asked.drafter, threads=asked.threads)
    measured = measured_shape(model.engine, seconds=2)
    if measured is None:
        parser.error("a pass of this model takes too long to measure several widths")
    shape = measured.shape
    step = measure_costs(model, (1,), 3).draft_share or 0.0
    print("C(T)/C(1)", *(f"{ratio:.2f}" for ratio in shape.rows), f"  a step of the drafter: {step:.3f}")
    curve = list(shape.rows)
    controls: dict[str, Callable[[Record], float]] = {
        f"depth {depth}": lambda one, depth=depth: speed(one, FixedDepth(depth), curve, step, True, False)
        for depth in range(1, MADE + 1)
    }
    controls["auto"] = lambda one: speed(one, AutoDepth(Alone(shape)), curve, step, True, True)
    controls["auto, drafter"] = lambda one: speed(one, AutoDepth(Alone(shape)), curve, step, True, False)
    controls["auto, lookup"] = lambda one: speed(one, AutoDepth(Alone(shape)), curve, step, False, True)
    print(f"{'':18}", *(f"{name:>13}" for name in controls))
    right: dict[str, list[list[bool]]] = {name: [[] for _ in range(LEVELS)] for name in ("drafter", "lookup")}
    for decoding, settings, seeds in (("greedy", {}, 1), ("sampled", SAMPLED, asked.seeds)):
        gains: dict[str, list[float]] = {name: [] for name in controls}
        for kind in NINE_KINDS:
            records = [
                record(model, kind, SamplingParams(max_tokens=asked.tokens, seed=seed, **settings))
                for seed in range(seeds)
            ]
            for name, of in controls.items():
                gains[name].append(fmean(of(one) for one in records))
            print(f"{decoding} {kind:10}", *(f"{gains[name][-1]:13.3f}" for name in controls), flush=True)
            for one in records:
                for at, place in enumerate(one.places):
                    for name, draft in (("drafter", place.drafter), ("lookup", place.lookup)):
                        if draft and draft.tokens:
                            right[name][draft.sureness[0]].append(draft.tokens[0] == one.text[at + 1])
        for name, of_all in (("mean", geometric_mean), ("worst", min)):
            print(f"{decoding} {name:10}", *(f"{of_all(gains[one]):13.3f}" for one in controls))
    for name, levels in right.items():
        shares = (f"{fmean(level):.2f} ({len(level)})" if level else "-" for level in levels)
        print(f"right by sureness, {name}:", *shares)


if __name__ == "__main__":
    main()
