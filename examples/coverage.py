"""Generates the table of docs/families.md: every Mixture-of-Experts block of transformers compared with moe_fn.

    python examples/coverage.py [--write docs/families.md] [--seeds 3] [--only mixtral,gpt_oss]

It runs in a checkout, after `pip install -e ".[dev]"`: blocks and models are those of `shared_tests`, checks those of
`property_tests`. Each variant of each family is a tiny block of transformers in float32 with random parameters and
buffers; it is run by its own code and by moe_forward(*from_block(block), x). --write replaces the text between the
markers of a file.
"""

import argparse
import datetime
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "property_tests"))

from test_transformers_laws import KNOWN, TOLERANCE, TWO_BANKS, compared
from test_transformers_zoo import classes_in_sources

from moe_fn.checkpoint.progress import Progress, clear
from moe_fn.integrations.transformers import register, replace_moe_blocks
from moe_fn.integrations.transformers.blocks import family_of_module
from moe_fn.testing.matching import relative_rms
from shared_tests.zoo import ROWS, BlockRow, make_block, make_input, run_block
from shared_tests.zoo.models import MODELS

TABLES = {
    "A": "softmax, then top-k",
    "B": "top-k, then softmax",
    "C": "sigmoid, groups",
    "D": "sigmoid, no groups",
    "E": "hash, sparsemixer, capacity, others",
}
BEGIN, END = "<!-- coverage -->", "<!-- /coverage -->"
BANKS = (
    "two banks of experts, of different sizes: `from_block` takes each bank, `replace_moe_blocks` the block, with an "
    "error of"
)
COUNTED = "moe_fn, counted"


@dataclass(frozen=True)
class Outcome:
    """The results of one variant.

    error       largest relative error of from_block, over the seeds; None if it refuses the block
    same        whether every token has the experts that the block's own router chooses
    refused     the reason why from_block refuses the block
    registered  largest relative error with `register`; None if its experts do not use transformers' interface
    """

    row: BlockRow
    error: float | None
    same: bool
    refused: str
    registered: float | None


def outcome(row: BlockRow, seeds: range, decorated: set[str], calls: list[str]) -> Outcome:
    found = [error_of_register(row, seed, decorated, calls) for seed in seeds]
    registered = None if None in found else max(error for error in found if error is not None)
    if row in TWO_BANKS:
        return Outcome(
            row, None, True, f"{BANKS} {max(error_of_replaced(row, seed) for seed in seeds):.0e}", registered
        )
    if row not in KNOWN:
        return Outcome(row, None, True, str(family_of_module(make_block(row, 0)).refused), registered)
    results = [compared(row, seed) for seed in seeds]
    return Outcome(row, max(error for error, _ in results), all(same for _, same in results), "", registered)


def error_of_replaced(row: BlockRow, seed: int) -> float:
    block, x = make_block(row, seed), make_input(row, seed + 1)
    expected = run_block(row, block, x).y
    replace_moe_blocks(block)
    return relative_rms(run_block(replace(row, routing="none"), block, x).y, expected)


def error_of_register(row: BlockRow, seed: int, decorated: set[str], calls: list[str]) -> float | None:
    """Returns the error of the block with its own router and moe_fn's experts; infinite if they were not called."""
    block, x = make_block(row, seed), make_input(row, seed + 1)
    if not any(type(module).__name__ in decorated for module in block.modules()):
        return None
    expected = run_block(row, block, x).y
    for module in block.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = COUNTED
    calls.clear()
    y = run_block(row, block, x).y
    return relative_rms(y, expected) if calls else math.inf


def register_counted(calls: list[str]) -> None:
    """Calls register() under another name with a function that records calls, as a module may ignore it."""
    register()
    ours = ExpertsInterface()["moe_fn"]

    def counted(module: nn.Module, *arguments: Tensor) -> Tensor:
        calls.append(type(module).__name__)
        return ours(module, *arguments)

    ExpertsInterface.register(COUNTED, counted)


def worst(outcomes: Iterable[Outcome]) -> str:
    errors = [o.error for o in outcomes if o.error is not None]
    return f"{max(errors):.0e}" if errors else "-"


def registers(outcomes: list[Outcome]) -> str:
    errors = [o.registered for o in outcomes if o.registered is not None]
    if not errors:
        return "outside"
    return "yes" if max(errors) <= TOLERANCE else f"no: {max(errors):.0e}"


def by_family(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    families: dict[str, list[Outcome]] = {}
    for o in outcomes:
        families.setdefault(o.row.family, []).append(o)
    return families


def summary(outcomes: list[Outcome]) -> list[str]:
    """Returns a line for each table of families."""
    lines = [
        "| routing | families | variants | equal | refused | largest relative error | same experts | `register()` | "
        "whole models |",
        "|---|--:|--:|--:|--:|--:|---|---|--:|",
    ]
    for table, title in TABLES.items():
        own = [o for o in outcomes if o.row.table == table]
        if not own:
            continue
        families = by_family(own)
        taken = [o for o in own if not o.refused]
        equal = sum(o.error is not None and o.error <= TOLERANCE for o in taken)
        same = "yes" if taken and all(o.same for o in taken) else "-" if not taken else "no"
        inside = [f for f in families.values() if registers(f) != "outside"]
        works = f"{sum(registers(f) == 'yes' for f in inside)} of {len(inside)}"
        outside = len(families) - len(inside)
        register_cell = f"{works}, {outside} outside" if outside else works
        whole = sum(family in MODELS for family in families)
        cells = (
            title,
            len(families),
            len(own),
            equal,
            len(own) - len(taken),
            worst(taken),
            same,
            register_cell,
            whole,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def refusals(outcomes: list[Outcome]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for o in outcomes:
        if o.refused:
            reasons.setdefault((o.row.family, o.refused), []).append(o.row.variant)
    return [f"- `{family}` ({', '.join(variants)}): {why}" for (family, why), variants in reasons.items()]


def rows_of_families(outcomes: list[Outcome]) -> list[str]:
    """Returns a line for each family."""
    lines = ["| family | variants | error | `register()` | whole model |", "|---|---|--:|---|---|"]
    for family, own in by_family(outcomes).items():
        variants = ", ".join(o.row.variant.replace("-", " ") + (" (refused)" if o.refused else "") for o in own)
        trouble = "" if all(o.same for o in own) else ", other experts"
        whole = "yes" if family in MODELS else "-"
        lines.append(f"| `{family}` | {variants} | {worst(own)}{trouble} | {registers(own)} | {whole} |")
    return lines


def text(outcomes: list[Outcome], seeds: int) -> str:
    """Returns the text between the markers."""
    families = by_family(outcomes)
    taken = sum(not o.refused for o in outcomes)
    head = (
        f"{len(families)} model directories of transformers {transformers.__version__}, {len(outcomes)} variants of "
        "their blocks,\n"
        f"{taken} of them taken by `from_block`; float32, {seeds} seeds each, torch {torch.__version__}, "
        f"{datetime.date.today()}.\n"
        f"Equal: a relative RMS error of at most {TOLERANCE:.0e}. Outside: transformers has no experts interface "
        "there.\n"
        "Whole models: logits and generated tokens are tested too. `python examples/coverage.py` measures and prints "
        "it."
    )
    parts = [head, "\n".join(summary(outcomes))]
    if refused := refusals(outcomes):
        parts.append("Refused, with a `ValueError` that says why:\n\n" + "\n".join(refused))
    parts.append(
        "<details><summary>Family by family</summary>\n\n" + "\n".join(rows_of_families(outcomes)) + "\n\n</details>"
    )
    return "\n\n".join(parts)


def write_between_markers(path: Path, content: str) -> None:
    """Replaces the text between the markers. Raises SystemExit unless the file has both, once and in order."""
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise SystemExit(f"{path}: expected {BEGIN} and, after it, {END}, once each")
    before, rest = old.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what is between {BEGIN} and {END}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="families, with commas between")
    options = parser.parse_args()
    wanted = [row for row in ROWS if not options.only or row.family in options.only.split(",")]
    if not wanted:
        raise SystemExit(
            f"--only {options.only}: no such family; expected some of {', '.join(sorted({row.family for row in ROWS}))}"
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    calls: list[str] = []
    register_counted(calls)
    decorated = {name for (_, name), is_decorated in classes_in_sources().items() if is_decorated}
    outcomes = []
    for done, row in enumerate(wanted):
        Progress(total=len(wanted), done=done, label=row.family).say(row.variant)
        outcomes.append(outcome(row, range(options.seeds), decorated, calls))
    clear()
    content = text(outcomes, options.seeds)
    print(content)
    if options.write:
        write_between_markers(options.write, content)
    wrong = [o.row.name for o in outcomes if not o.refused and (not o.same or o.error is None or o.error > TOLERANCE)]
    wrong += [o.row.name for o in outcomes if o.registered is not None and o.registered > TOLERANCE]
    if wrong:
        raise SystemExit(f"not equal: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
