"""A training's log as a picture: loss and agreement against steps, of what it learns from and of what is held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from gemma_mtp.charts import Line, LineChart, picture

Figures = dict[int, dict[str, Any]]
"""A line of the log by its step."""


def chart_of_training(log: Path, title: str) -> str | None:
    """An SVG picture of a log.jsonl as `distill` writes it; None if it has no figures yet."""
    learnt, held_out = read_figures(log)
    if not learnt:
        return None
    depths = range(len(next(iter(learnt.values()))["greedy"]))

    def lines(name: str, colour: int, figure: Callable[[dict[str, Any]], float]) -> list[Line]:
        kinds = {name: learnt, f"{name}, held out": held_out}
        drawn = {kind: [(float(step), figure(of)) for step, of in figures.items()] for kind, figures in kinds.items()}
        return [Line(kind, points, colour, kind != name) for kind, points in drawn.items() if points]

    charts = [LineChart("Loss in nats", "steps", lines("loss", 0, itemgetter("loss")), from_zero=False)]
    for key in ("greedy", "sampled"):
        by_depth = [lines(f"depth {i + 1}", i, lambda of, key=key, i=i: of[key][i]) for i in depths]  # type: ignore[misc]
        charts.append(LineChart(f"Agreement, {key}", "steps", [line for each in by_depth for line in each]))
    return picture(title, charts)


def read_figures(log: Path) -> tuple[Figures, Figures]:
    """Of the lessons, and of those held out, in the order of steps.

    Of steps that were done again after a resumption the last count, and what is before a start afresh does not. A line
    that was cut off is passed over.
    """
    events: dict[str, Figures] = {"drafter": {}, "held out": {}}
    for text in log.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["event"] == "start" and not line["resumed"]:
            for figures in events.values():
                figures.clear()
        elif line["event"] in events:
            events[line["event"]][line["step"]] = line
    learnt, held_out = (dict(sorted(figures.items())) for figures in events.values())
    return learnt, held_out
