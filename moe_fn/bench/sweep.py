"""python -m moe_fn.bench.sweep --model qwen3-30b-a3b: finds the fastest tiles on this GPU, and prints rows for
moe_fn.kernels.triton.tile_tables.

For each kernel and number of tokens, the table's tile and its neighbours are timed in turns with a cold L2 cache; a
neighbour replaces the tile if it is faster by more than MARGIN. No file is written: paste the rows, then compile them
ahead of time, which reports spills and budgets.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe_fn.bench.clock import Run, Timer
from moe_fn.bench.models import Model, model_of_name, model_of_shape
from moe_fn.bench.problem import DTYPES
from moe_fn.bench.timing import take_turns
from moe_fn.bench.timing_cuda import cold_timer
from moe_fn.config import as_activation
from moe_fn.kernels.triton import tiles
from moe_fn.kernels.triton.tile_tables import ARCHITECTURES, Tile

MARGIN = 0.03  # a tile must be faster by this to replace the table's: medians repeat within 1 to 2 %
ACCUMULATORS = 128  # float32 values per thread at most: more leave too few of 255 registers for loads
Launch = Callable[[Tile], Run]


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of each tile for one problem and kind of kernel; chosen: the tile in the tables."""

    kind: str
    rows_per_expert: float
    chosen: Tile
    times: Mapping[Tile, float]


def candidates(kind: str, chosen: Tile, dtype_bytes: int, arch: str) -> tuple[Tile, ...]:
    """The tile, and plausible ones that differ from it in one or two fields, each halved or doubled."""
    found = [chosen]
    for steps in itertools.product(*[(-1, 0, 1)] * 4, (-1, 0, 1, 2)):
        if 1 <= sum(step != 0 for step in steps) <= 2:
            sizes = (chosen.rows, chosen.columns, chosen.inner, chosen.warps)
            rows, columns, inner, warps = (int(size * 2.0**step) for size, step in zip(sizes, steps, strict=False))
            found.append(Tile(rows, columns, inner, warps, chosen.stages + steps[4]))
    return tuple(tile for tile in found if tile == chosen or _plausible(kind, tile, dtype_bytes, arch))


def _plausible(kind: str, tile: Tile, dtype_bytes: int, arch: str) -> bool:
    if tile.warps not in (2, 4, 8) or not 1 <= tile.stages <= 6:
        return False
    if kind.startswith("decode"):
        bytes_under_way = tile.rows * tile.columns * tile.inner * dtype_bytes * tile.stages
        sensible = tile.rows == 1 if "up" in kind else tile.rows >= 1  # the up-projection uses one row
        return sensible and tile.columns >= 1 and tile.inner >= 16 and 4096 <= bytes_under_way <= 98304
    fits = tiles.shared_memory(tile, dtype_bytes, arch) <= ARCHITECTURES[arch].shared_memory
    small = tile.rows * tile.columns <= ACCUMULATORS * 32 * tile.warps
    return fits and small and 16 <= tile.rows <= 256 and 16 <= tile.columns <= 256 and 16 <= tile.inner <= 256


def best_tile(problems: Sequence[Measured]) -> Tile:
    """The fastest tile for problems of one kind and bucket: by the geometric mean of times over the chosen tile's."""
    chosen = problems[0].chosen
    everywhere = set.intersection(*(set(problem.times) for problem in problems)) | {chosen}

    def ratio(tile: Tile) -> float:
        return statistics.geometric_mean(
            problem.times.get(tile, math.inf) / problem.times[problem.chosen] for problem in problems
        )

    fastest = min(sorted(everywhere - {chosen}, key=str), key=ratio, default=chosen)
    return fastest if fastest != chosen and ratio(fastest) < 1 - MARGIN else chosen


def table_rows(measured: Iterable[Measured], arch: str, dtype_bytes: int) -> str:
    """Rows of tile_tables for the measurements; neighbours with one tile share a row, limits are geometric means."""
    lines = []
    of_kind: dict[str, dict[float, list[Measured]]] = {}
    for one in measured:
        of_kind.setdefault(one.kind, {}).setdefault(one.rows_per_expert, []).append(one)
    for kind, buckets in of_kind.items():
        best = [(number, best_tile(problems)) for number, problems in sorted(buckets.items())]
        lines.append(f"# {kind}")
        for place, (number, tile) in enumerate(best):
            last = place == len(best) - 1
            if last or best[place + 1][1] != tile:
                border = "math.inf" if last else f"{math.sqrt(number * best[place + 1][0]):.3g}"
                numbers = ", ".join(str(getattr(tile, field.name)) for field in fields(Tile))
                lines.append(f'("{arch}", {dtype_bytes}, {border}, Tile({numbers})),')
    return "\n".join(lines)


def launches(model: Model, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tile, Launch]]:
    """For each kind of kernel, its tile and a launch with a given tile; random routing, uniform over experts."""
    from moe_fn.kernels.triton.down_backward import down_backward
    from moe_fn.kernels.triton.metadata import sort_slots
    from moe_fn.kernels.triton.outer import grouped_outer
    from moe_fn.kernels.triton.products import grouped_product
    from moe_fn.kernels.triton.up import up

    config, activation = model.config, as_activation(model.config.activation)
    interleaved = config.gate_up_layout == "interleaved"
    x, gate_up, down = _matrices(model, tokens, dtype, device)
    (_, hidden, columns), inner, rows = gate_up.shape, down.shape[1], tokens * config.top_k
    ids = torch.rand(tokens, config.num_experts, device=device).topk(config.top_k).indices
    weights = torch.rand(tokens, config.top_k, device=device)
    slots, maps = sort_slots(ids, config.num_experts, (16, 32, 64, 128, 256))
    map_of = {tile_map.rows: tile_map for tile_map in maps}
    activated, pre = x.new_ones(rows, inner), x.new_ones(rows, columns)

    def tile(choose: Callable[..., Tile], *sizes: int) -> Tile:
        return choose(rows, config.num_experts, *sizes, dtype.itemsize, tiles.architecture_of(device))

    found: dict[str, tuple[Tile, Launch]] = {
        "up": (
            tile(tiles.up_tile, hidden, columns),
            lambda t: lambda: up(x, slots, map_of[t.rows], gate_up, None, activation, interleaved, False, t),
        ),
        "product": (
            tile(tiles.product_tile, inner, hidden),
            lambda t: lambda: grouped_product(activated, down, slots.ends, map_of[t.rows], t),
        ),
        "down_backward": (
            tile(tiles.down_backward_tile, hidden, inner),
            lambda t: (
                lambda: down_backward(x, down, None, pre, weights, slots, map_of[t.rows], activation, interleaved, t)
            ),
        ),
        "outer": (
            tile(tiles.outer_tile, columns, hidden),
            lambda t: (
                lambda: grouped_outer(
                    pre, x, slots.begins, slots.ends, t, slots.slot_of_row, slots.top_k, gather_right=True
                )
            ),
        ),
    }
    return found | (_decode_launches(model, x, gate_up, down, ids, weights) if rows * 4 <= config.num_experts else {})


def _decode_launches(
    model: Model, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, tuple[Tile, Launch]]:  # fmt: skip
    from moe_fn.kernels.triton.small_batch import down_of_slots, up_of_slots

    activation, interleaved = as_activation(model.config.activation), model.config.gate_up_layout == "interleaved"
    in_out = model.config.weight_layout == "in_out"
    about = (x.element_size(), tiles.architecture_of(x.device))
    (experts, hidden, columns), inner, slots = gate_up.shape, down.shape[1], ids.numel()
    activated = x.new_ones(slots, inner)
    layout = "_in_out" if in_out else ""
    return {
        f"decode_up{layout}": (
            tiles.decode_up_tile(slots, experts, hidden, columns, *about, in_out=in_out),
            lambda t: lambda: up_of_slots(x, ids, gate_up, None, activation, interleaved, t),
        ),
        f"decode_down{layout}": (
            tiles.decode_down_tile(slots, experts, inner, hidden, *about, in_out=in_out, top_k=ids.shape[1]),
            lambda t: lambda: down_of_slots(activated, ids, weights, down, None, x.dtype, t),
        ),
    }


def _matrices(model: Model, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], gate_up [E, H, N] and down [E, I, H], in the memory layout of the model's weights."""
    config = model.config
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    columns = config.gate_up_size

    def weight(rows: int, width: int) -> Tensor:
        shape = (experts, rows, width) if config.weight_layout == "in_out" else (experts, width, rows)
        made = torch.randn(shape, device=device, dtype=dtype)
        return made if config.weight_layout == "in_out" else made.mT

    return torch.randn(tokens, hidden, device=device, dtype=dtype), weight(hidden, columns), weight(inner, hidden)


def measure(
    model: Model, tokens: int, dtype: torch.dtype, device: torch.device, timer: Timer, seconds: float
) -> list[Measured]:
    """Times every kind of kernel of the layer with every candidate that compiles; `seconds` for each kind."""
    found = []
    for kind, (chosen, launch) in launches(model, tokens, dtype, device).items():
        runs: dict[str, Callable[[int], Run]] = {}
        named: dict[str, Tile] = {}
        for tile in candidates(kind, chosen, dtype.itemsize, tiles.architecture_of(device)):
            run = launch(tile)
            try:
                run()
            except Exception as error:  # candidates that do not compile or fit are skipped; the table's tile must run
                if tile == chosen:
                    raise
                print(f"{kind} {tile}: {type(error).__name__}", file=sys.stderr)
                continue
            runs[str(tile)], named[str(tile)] = (lambda turn, run=run: run), tile  # type: ignore[misc]
        times = take_turns(runs, timer, seconds, inputs=1)
        medians = {tile: statistics.median(times[name]) for name, tile in named.items()}
        number = (
            model.config.top_k if kind.startswith("decode") else tokens * model.config.top_k / model.config.num_experts
        )
        found.append(Measured(kind, number, chosen, medians))
        print(report(found[-1], model, tokens), flush=True)
    return found


def report(one: Measured, model: Model, tokens: int) -> str:
    """A line with the three fastest tiles of a problem and the table's."""
    fastest = "; ".join(_timed(one, tile) for tile in sorted(one.times, key=lambda tile: one.times[tile])[:3])
    return f"{model.name} T={tokens} {one.kind}: {fastest}; in the table: {_timed(one, one.chosen)}"


def _timed(one: Measured, tile: Tile) -> str:
    return f"{one.times[tile] * 1e3:.1f} us {tile.rows}x{tile.columns}x{tile.inner} w{tile.warps} s{tile.stages}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m moe_fn.bench.sweep", description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="names as of moe_fn.bench, comma-separated")
    parser.add_argument("--shape", action="append", default=[], help="E,k,H,I; repeatable")
    parser.add_argument("--tokens", default="1,16,256,4096")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each kernel and number of tokens")
    options = parser.parse_args(arguments)
    try:
        models = [model_of_name(name) for name in options.model.split(",")] + [
            model_of_shape(text) for text in options.shape
        ]
        tokens = [int(number) for number in options.tokens.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("tiles are timed on a GPU, and torch finds none")
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    timer, measured = cold_timer(device), list[Measured]()
    for model, number in itertools.product(models, tokens):
        measured += measure(model, number, dtype, device, timer, options.seconds)
    print(table_rows(measured, tiles.architecture_of(device), dtype.itemsize))
    return 0


if __name__ == "__main__":
    sys.exit(main())
