"""What `bench --mtp` and `eval-drafter` print of what drafting gains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_mtp.errors import SettingsError

if TYPE_CHECKING:
    from gemma_mtp import Model
    from gemma_mtp.measuring.cost import Costs
    from gemma_mtp.measuring.projection import Projected
    from gemma_mtp.measuring.speed import Gain, Summary
    from gemma_mtp.training.evaluate import Acceptance

DEPTH = 3
WIDTHS = range(1, 9)


def bench_drafting(
    model: Model, tokens: int, repeats: int, plot: Path | None, project: bool, as_json: bool
) -> None:
    """Measures all that `bench --mtp` promises, prints it and draws it. Raises SettingsError, CheckpointError."""
    from gemma_mtp.checkpoints.files import written_whole
    from gemma_mtp.measuring import projection
    from gemma_mtp.measuring.cost import measure_costs

    if plot and not plot.parent.is_dir():
        raise SettingsError(f"There is no folder {plot.parent} to put {plot.name} in: make it first.")
    costs = measure_costs(model, WIDTHS, repeats)
    projected = projection.project(costs) if project else []
    found, measured, summaries = report_gains(model, tokens, DEPTH, repeats, as_json)
    if plot:
        with written_whole(plot) as out:
            out.write(chart(model, measured, summaries, costs).encode())
    if not as_json:
        print("\n" + cost_table(costs))
        if projected:
            print("\n" + projection_table(model, projected))
        return
    found["pass_seconds"], found["draft_step_seconds"] = costs.passes, costs.draft_step
    if projected:
        found["projection"] = {
            "what": projection_basis(model),
            "rows": [row.as_json() for row in projected],
        }
    print(json.dumps(found))


def report_gains(
    model: Model, tokens: int, depth: int, repeats: int, as_json: bool
) -> tuple[dict[str, Any], list[Gain], dict[str, Summary]]:
    """Measures the nine kinds and prints a line for each, unless all is to be JSON. Returns what JSON says of them."""
    from gemma_mtp.measuring.speed import gains, summaries

    measured: list[Gain] = []
    if not as_json:
        print(f"{model.name}, drafter {model.drafter_name}, {model.threads} threads, {tokens} tokens of each text")
        print(f"Acceptance at a fixed depth of {depth}. Speed-up: automatic over plain, medians of {repeats} in turns.")
        print(f"\n{'':20} {'acceptance':{5 * depth}} {'without loops':{max(13, 5 * depth)}} plain    auto speed-up")
    for gain in gains(model, tokens, depth, repeats):
        measured.append(gain)
        if not as_json:
            print(gain_line(gain), flush=True)
    found = summaries(measured)
    if not as_json:
        print(*(summary_line(decoding, of) for decoding, of in found.items()), sep="\n")
    described = {
        "target": model.name,
        "drafter": model.drafter_name,
        "threads": model.threads,
        "tokens": tokens,
        "repeats": repeats,
        "rows": [gain.as_json() for gain in measured],
        "summary": {decoding: of.as_json() for decoding, of in found.items()},
    }
    return described, measured, found


def card_section(model: Model, tokens: int = 64) -> str:
    """Measures the nine kinds once and briefly, and says it in Markdown, as a section of a drafter's card."""
    from gemma_mtp.measuring.speed import gains, summaries

    measured = list(gains(model, tokens, DEPTH, repeats=1))
    depths = " | ".join(f"depth {depth + 1}" for depth in range(DEPTH))
    lines = [
        "## By kind of prompt\n",
        f"{tokens} tokens each, {model.threads} threads; sampled: temperature 1, top-k 64, top-p 0.95. Acceptance at a "
        "fixed depth; speed of automatic drafting, prompt lookup included, over plain decoding, measured once "
        "(`gemma-mtp eval-drafter` measures it longer).\n",
        f"| | {depths} | speed-up |\n|---|{'---|' * DEPTH}---|",
        *(_card_row(f"{gain.decoding}, {gain.kind}", gain.acceptance, gain.speed_up) for gain in measured),
        *(_card_row(f"{name}, all", of.acceptance, of.mean) for name, of in summaries(measured).items()),
    ]
    return "\n".join(lines)


def _card_row(name: str, acceptance: Acceptance, speed_up: float) -> str:
    return f"| {name} | {' | '.join(f'{rate:.2f}' for rate in acceptance.rates)} | {speed_up:.2f} |"


def gain_line(gain: Gain) -> str:
    speed = f"{gain.plain:7.1f} {gain.auto:7.1f} {gain.speed_up:8.2f}{'' if gain.same else '  OTHER TOKENS'}"
    return f"{gain.decoding:8} {gain.kind:11} {_both(gain)} {speed}"


def summary_line(decoding: str, of: Summary) -> str:
    return f"{decoding:8} {'all':11} {_both(of)} {'':15} {of.mean:8.2f} geometric mean, {of.worst:.2f} worst"


def _both(of: Gain | Summary) -> str:
    parts = [
        " ".join(f"{rate:.2f}" if tried else "   -" for rate, tried in zip(each.rates, each.tried, strict=True))
        for each in (of.acceptance, of.without_loops)
    ]
    return f"{parts[0]}  {parts[1]:13}"


def cost_table(costs: Costs) -> str:
    lines = ["rows of a pass " + "".join(f"{rows:7}" for rows in costs.passes)]
    lines.append("milliseconds   " + "".join(f"{seconds * 1e3:7.2f}" for seconds in costs.passes.values()))
    lines.append("C(T)/C(1)      " + "".join(f"{ratio:7.2f}" for ratio in costs.over_one.values()))
    if costs.draft_step is not None:
        lines.append(f"A step of the drafter: {costs.draft_step * 1e3:.2f} ms, {costs.draft_share:.3f} of C(1)")
    return "\n".join(lines)


def projection_basis(model: Model) -> str:
    """What a projection is and what it is made from, in sentences."""
    from gemma_mtp.measuring.projection import ACCEPTANCE

    low, high = ACCEPTANCE
    return (
        "A PROJECTION, not a measurement: none of these models was run. It takes the cost curve C(T)/C(1) and the "
        f"draft step over C(1) as measured here on {model.name} with {model.drafter_name}, and the acceptance "
        f"published for Gemma 4, {low} to {high}, as that of every depth. A model of another size or type has another "
        "curve; "
        "only for the mixture of experts are passes made dearer, by the experts that more rows read."
    )


def projection_table(model: Model, projected: Sequence[Projected]) -> str:
    import textwrap

    lines = [*textwrap.wrap(projection_basis(model), 100), ""]
    for acceptance in dict.fromkeys(row.acceptance for row in projected):
        lines.append(f"projected speed-up at acceptance {acceptance}")
        lines += [
            f"  {row.model:16} {row.speed_up:5.2f} (depth {row.depth})"
            for row in projected
            if row.acceptance == acceptance
        ]
    return "\n".join(lines)


def chart(model: Model, measured: Sequence[Gain], summaries: dict[str, Summary], costs: Costs) -> str:
    """An SVG picture: acceptance at each depth, the cost of a pass by its rows, the speed-up of each kind."""
    from gemma_mtp.charts import BarChart, Line, LineChart, picture

    def by_depth(of: Acceptance) -> list[tuple[float, float]]:
        return [(depth, rate) for depth, (rate, tried) in enumerate(zip(of.rates, of.tried, strict=True), 1) if tried]

    acceptance: list[Line] = []
    for colour, (decoding, of) in enumerate(summaries.items()):
        acceptance.append(Line(decoding, by_depth(of.acceptance), colour))
        acceptance.append(Line(f"{decoding}, without loops", by_depth(of.without_loops), colour, dashed=True))
    curve = [(float(rows), ratio) for rows, ratio in costs.over_one.items()]
    speed_ups: dict[str, list[float]] = {}
    for gain in measured:
        speed_ups.setdefault(gain.decoding, []).append(gain.speed_up)
    return picture(
        f"{model.name}, drafter {model.drafter_name}",
        [
            LineChart("Acceptance at each depth", "depth", acceptance),
            LineChart("Cost of a pass, C(T)/C(1)", "rows of the pass", [Line("C(T)/C(1)", curve, 0)]),
            BarChart(
                "Speed-up over plain decoding", list(dict.fromkeys(gain.kind for gain in measured)), speed_ups, mark=1.0
            ),
        ],
    )
