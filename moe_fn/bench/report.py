"""Reports of times of layers: Markdown tables and JSON."""

import math
from dataclasses import dataclass
from typing import Any

from moe_fn.bench.contestants.entry import UNQUANTIZED, Contestant
from moe_fn.bench.floor import floor_ms
from moe_fn.bench.memory import sonic_bytes
from moe_fn.bench.problem import DTYPES
from moe_fn.bench.results import Cell, Result, result_as_json


@dataclass(frozen=True, kw_only=True)
class Style:
    """Format of a device's times: digits of a millisecond, and whether TFLOP/s are shown."""

    digits: int
    tflops: bool


LOST = 0.95  # a time over another one that is a loss: two runs of one contestant differ by up to 5 %

STYLES = {"cpu": Style(digits=3, tflops=False), "cuda": Style(digits=4, tflops=True)}


def title(result: Result) -> str:
    """A title for the result's combination."""
    done = result.combination
    what = "forward and backward" if done.backward else "forward"
    where = f"{done.threads} thread{'s' if done.threads > 1 else ''}" if done.device == "cpu" else done.device
    dtype = done.dtype if done.quant == "none" else f"{done.quant}, {done.dtype}"
    return f"{done.model.name}, {dtype}, {where}, {done.part}, {what}"


def gemm_rate(result: Result, results: tuple[Result, ...]) -> float:
    """GFLOP/s: the largest rate of the result's probes over all results with the same dtype, device and threads."""
    same = (result.combination.dtype, result.combination.device, result.combination.threads)
    alike = [
        other
        for other in results
        if (other.combination.dtype, other.combination.device, other.combination.threads) == same
    ]
    return max(
        (rate for other in alike for name in result.gemm_gflops for rate in other.gemm_gflops.get(name, ())),
        default=math.inf,
    )


def summary(cell: Cell, rate: float, rows: tuple[Contestant, ...]) -> dict[str, Any]:
    """The cell's floor in ms, its share of our time, TFLOP/s, and ratios of other times to ours; None where missing.

    best_other_over_ours: time of the best other contestant; unquantized_over_ours: our own time with decoded weights.
    """
    floor = floor_ms(cell.read_ms, cell.flops, rate)
    times = {name: outcome.median_ms for name, outcome in cell.outcomes.items() if outcome.median_ms is not None}
    mine = next((times[row.name] for row in rows if row.ours and row.name != UNQUANTIZED and row.name in times), None)
    others = {row.name: times[row.name] for row in rows if not row.ours and row.name in times}
    best = min(others, key=lambda name: others[name], default=None)
    return {
        "floor_ms": floor,
        "share_of_floor": None if mine is None else floor / mine,
        "tflops": None if mine is None else cell.flops / mine / 1e9,
        "best_other": best,
        "best_other_over_ours": None if mine is None or best is None else others[best] / mine,
        "unquantized_over_ours": None if mine is None or UNQUANTIZED not in times else times[UNQUANTIZED] / mine,
    }


def geomean(values: list[float | None]) -> float | None:
    """The geometric mean of the values that are not None.

    >>> geomean([1.0, None, 4.0])
    2.0
    """
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def machine_line(about: dict[str, Any]) -> str:
    """A line with the CPU or GPU, the level of each contestant that has one, versions, commit and date."""
    where = about["gpu"] or f"{about['cpu']}, {about['cores']} cores, {' '.join(_notable(about['cpu_features']))}"
    levels = ", ".join(f"{name} {level}" for name, level in (about["levels"] or {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    made = f"Commit {about['commit']}, {about['date']}." if about["commit"] else f"{about['date']}."
    return " ".join((f"{where}.", *([f"Levels: {levels}."] if levels else ()), f"Versions: {versions}.", made))


def _notable(features: list[str]) -> list[str]:
    """The instructions that choose between kernels: products of bfloat16, float16 and int8, and tiles."""
    return [name for name in features if name == "avx2" or name.endswith(("_f", "_bf16", "_fp16", "vnni", "tile"))]


def losses(results: tuple[Result, ...], rows: tuple[Contestant, ...]) -> tuple[tuple[float, str], ...]:
    """(faster time over slower, what lost) of cells where "auto" takes the slower way, worst first: each contestant of
    moe_fn against plain torch, and the first of them against its other paths.
    """
    found = []
    for result in results:
        for cell in result.cells:
            times = {
                row: t
                for row in rows
                if (t := cell.outcomes[row.name].median_ms if row.name in cell.outcomes else None)
            }
            ours = [row for row in times if row.ours]
            of_torch = min((row for row in times if _is_torch(row)), key=lambda row: times[row], default=None)
            pairs = [(row, of_torch) for row in ours if of_torch is not None] + [(ours[0], row) for row in ours[1:]]
            for row, other in pairs:
                if (ratio := times[other] / times[row]) < LOST:
                    where = f"{title(result)}, {cell.tokens} token{'s' if cell.tokens > 1 else ''}"
                    found.append(
                        (ratio, f"{where}: {row.name} {times[row]:.3f} ms, {other.name} {times[other]:.3f} ms")
                    )
    return tuple(sorted(found))


def _is_torch(row: Contestant) -> bool:
    """Whether the contestant is torch's own ops, by its name's first word."""
    return row.name.split()[0] in ("torch", "transformers")


def markdown(results: tuple[Result, ...], rows: tuple[Contestant, ...], absent: dict[str, str]) -> str:
    """The cells that are lost, a table for each result, geometric means, and absent contestants with reasons."""
    lost = [f"- {ratio:.2f}: {what}" for ratio, what in losses(results, rows)]
    blocks = ["### Slower than plain torch or another path of moe_fn\n\n" + "\n".join(lost)] if lost else []
    blocks += [_table(result, gemm_rate(result, results), rows) for result in results]
    summaries = [summary(cell, gemm_rate(result, results), rows) for result in results for cell in result.cells]
    if len(results) > 1:
        share, ratio = (geomean([one[key] for one in summaries]) for key in ("share_of_floor", "best_other_over_ours"))
        blocks.append(
            f"All cells, geometric means: share of floor {_number(share, 2)}, best other / ours {_number(ratio, 2)}"
        )
    if any(result.combination.quant != "none" for result in results):
        blocks.append(_overview(results, rows))
    blocks += ["\n".join(f"{name} is left out: {reason}" for name, reason in absent.items())] if absent else []
    return "\n\n".join(blocks)


def as_json(
    results: tuple[Result, ...],
    rows: tuple[Contestant, ...],
    absent: dict[str, str],
    about: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Results, machine and options as plain values."""
    values = []
    for result in results:
        rate = gemm_rate(result, results)
        one = result_as_json(result)
        one["gemm_rate_gflops"] = None if math.isinf(rate) else rate
        for cell, written in zip(result.cells, one["cells"], strict=True):
            written |= summary(cell, rate, rows) | {"read_gb_per_s": cell.bytes / cell.read_ms / 1e6}
        values.append(one)
    return {"machine": about, "options": options, "left_out": absent, "results": values}


def _table(result: Result, rate: float, rows: tuple[Contestant, ...]) -> str:
    left_out = "\n".join(f"- {tokens} tokens are left out: {reason}" for tokens, reason in result.left_out.items())
    if result.failure is not None or not result.cells:
        return f"### {title(result)}\n\n{result.failure or left_out}"
    rows = tuple(row for row in rows if row.name in result.cells[0].outcomes)  # others do not take part
    style = STYLES[result.combination.device.split(":")[0]]
    mine = next((row.name for row in rows if row.ours), "ours")
    speed = ["TFLOP/s"] if style.tflops else []
    header = ["tokens", "floor", *(row.name for row in rows), "share of floor", *speed, f"best other / {mine}"]
    lines = [header, ["--:"] * len(header)]
    summaries = [summary(cell, rate, rows) for cell in result.cells]
    for cell, one in zip(result.cells, summaries, strict=True):
        times = [_entry(cell, row, style) for row in rows]
        speeds = [_number(one["tflops"], 1)] if style.tflops else []
        ratios = [_number(one["share_of_floor"], 2), *speeds, _number(one["best_other_over_ours"], 2)]
        lines.append([str(cell.tokens), _number(one["floor_ms"], style.digits), *times, *ratios])
    means = [_number(geomean([one[key] for one in summaries]), 2) for key in ("share_of_floor", "best_other_over_ours")]
    lines.append(["geomean", "", *("" for _ in rows), means[0], *("" for _ in speed), means[1]])
    parts = (
        f"### {title(result)}",
        _rows(lines),
        _measured(result, rate),
        _memory(result, rows),
        _notes(result),
        left_out,
    )
    return "\n\n".join(part for part in parts if part)


def _overview(results: tuple[Result, ...], rows: tuple[Contestant, ...]) -> str:
    """A table with one line for each model, dtype and quantization."""
    tokens = sorted({cell.tokens for result in results for cell in result.cells})
    lines = [["model", "x", "quant", *(f"T={count}" for count in tokens)], ["--"] * (3 + len(tokens))]
    for result in results:
        rate, done = gemm_rate(result, results), result.combination
        ratios = {}
        for cell in result.cells:
            one = summary(cell, rate, rows)
            shown = (one[key] for key in ("share_of_floor", "best_other_over_ours", "unquantized_over_ours"))
            ratios[cell.tokens] = " / ".join(_number(value, 2) for value in shown)
        lines.append([done.model.name, done.dtype, done.quant, *(ratios.get(count, "-") for count in tokens)])
    return (
        f"Share of floor / best other's time over ours / our time with floats over that with codes:\n\n{_rows(lines)}"
    )


def _rows(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measured(result: Result, rate: float) -> str:
    bandwidths = [cell.bytes / cell.read_ms / 1e6 for cell in result.cells]
    launches = [cell.launch_ms for cell in result.cells if cell.launch_ms is not None]
    launch = f" A graph of one empty kernel: {min(launches):.4f} to {max(launches):.4f} ms." if launches else ""
    floor = f"Floor: {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s ({result.read_with}), {rate:,.0f} GFLOP/s."
    return f"Medians in ms. {floor}{launch}"


def _memory(result: Result, rows: tuple[Contestant, ...]) -> str:
    """A table of activation memory in MB, kept and peak, where it was counted."""
    done = result.combination
    named = [row.name for row in rows if any(cell.outcomes[row.name].memory is not None for cell in result.cells)]
    if not named:
        return ""
    header = ["tokens", "SonicMoE's formula", *named]
    lines = [header, ["--:"] * len(header)]
    for cell in result.cells:
        formula = sonic_bytes(done.model.config, cell.tokens, DTYPES[done.dtype].itemsize)
        counts = [cell.outcomes[name].memory for name in named]
        lines.append(
            [
                str(cell.tokens),
                f"{formula / 1e6:.1f}",
                *(f"{m.kept / 1e6:.1f}, {m.peak / 1e6:.1f}" if m else "-" for m in counts),
            ]
        )
    return (
        "Activation memory in MB: kept for the backward pass, and the peak of both passes with all "
        f"gradients.\n\n{_rows(lines)}"
    )


def _entry(cell: Cell, row: Contestant, style: Style) -> str:
    outcome = cell.outcomes[row.name]
    if outcome.median_ms is not None:
        return _number(outcome.median_ms, style.digits) + ("*" if outcome.why is not None else "")
    return "-" if outcome.status == "refused" else outcome.status


def _notes(result: Result) -> str:
    """Reasons for missing times and for times without a graph, each once with its numbers of tokens."""
    tokens: dict[tuple[str, str, str], list[int]] = {}
    for cell in result.cells:
        for name, outcome in cell.outcomes.items():
            if outcome.median_ms is None:
                tokens.setdefault((name, outcome.status, outcome.reason or ""), []).append(cell.tokens)
            elif outcome.why is not None:
                tokens.setdefault((f"{name}*", "called, not replayed as a graph", outcome.why), []).append(cell.tokens)
    everywhere = len(result.cells)
    return "\n".join(
        f"- {name}: {status + ', ' if status != 'refused' else ''}{reason}"
        + ("" if len(where) == everywhere else f" (at {', '.join(map(str, where))})")
        for (name, status, reason), where in tokens.items()
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
