"""Plot of time over tokens on logarithmic axes, one panel per combination, with the floor as a dashed line."""

import importlib
from pathlib import Path
from typing import Any

from moe_fn.bench.contestants.entry import Contestant
from moe_fn.bench.floor import floor_ms
from moe_fn.bench.report import gemm_rate, title
from moe_fn.bench.results import Result

_COLUMNS = 3


def plot(results: tuple[Result, ...], rows: tuple[Contestant, ...], path: Path) -> None:
    """Writes the plot to `path`."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    shown = [result for result in results if result.cells]
    if not shown:
        return
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 4.5 * lines), squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    for result, panel in zip(shown, axes.flat, strict=False):
        _draw(panel, result, gemm_rate(result, results), rows)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(panel: Any, result: Result, rate: float, rows: tuple[Contestant, ...]) -> None:
    tokens = [cell.tokens for cell in result.cells]
    for place, row in enumerate(rows):
        outcomes = [(cell.tokens, cell.outcomes.get(row.name)) for cell in result.cells]
        points = [
            (count, outcome.median_ms)
            for count, outcome in outcomes
            if outcome is not None and outcome.median_ms is not None
        ]
        if points:
            style = {
                "color": f"C{place % 10}",
                "linestyle": "-" if place < 10 else "-.",
                "linewidth": 2 if row.ours else 1,
            }
            panel.plot(*zip(*points, strict=True), label=row.name, marker="o", markersize=3, **style)
    floors = [floor_ms(cell.read_ms, cell.flops, rate) for cell in result.cells]
    panel.plot(tokens, floors, label="floor", color="black", linestyle="--")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_title(title(result), fontsize=9)
    panel.set_xlabel("tokens")
    panel.set_ylabel("ms")
    panel.grid(True, which="both", alpha=0.2)
    panel.legend(fontsize=6)  # one per panel, since panels have different contestants
