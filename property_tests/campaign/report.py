"""The results of a campaign as Markdown and JSON: pairwise coverage, worst errors by dtype and option, failures."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from campaign.checking import Line
from campaign.coverage import AXES, Coverage, coverage_of
from campaign.drawing import DTYPES
from campaign.laws import LAWS
from campaign.summary import by, number, summary_of, table

_MISSING_SHOWN = 40


def report(lines: Sequence[Line], about: dict[str, Any]) -> str:
    """Returns the page."""
    coverage = coverage_of([line.features for line in lines])
    parts = [_head(lines, about), _failures(lines), _laws(lines), _coverage(coverage), _errors(lines)]
    return "\n".join(parts)


def as_json(lines: Sequence[Line], about: dict[str, Any]) -> dict[str, Any]:
    """Returns the same numbers for a JSON file."""
    coverage = coverage_of([line.features for line in lines])
    groups = {
        f"{dtype} {option}={value}": dataclasses.asdict(summary_of(group))
        for dtype, of_dtype in by(lines, lambda line: line.features["dtype"]).items()
        for option in AXES
        for value, group in by(of_dtype, lambda line, option=option: line.features[option]).items()  # type: ignore[misc]
    }
    return {
        "about": about,
        "problems": len(lines),
        "failures": {str(line.index): line.failures for line in lines if line.failures},
        "pairs": {
            "met": _met(coverage),
            "possible": coverage.possible,
            "excluded": coverage.excluded,
            "missing": coverage.missing,
        },
        "errors": groups,
    }


def _head(lines: Sequence[Line], about: dict[str, Any]) -> str:
    last = about["runs"][-1]
    commits = ", ".join(dict.fromkeys(str(run["commit"]) for run in about["runs"]))
    undecided = (
        f"{sum(line.tied for line in lines)} had codes of rounded inputs that may differ between float32 and float64"
    )
    gradients = sum(line.gradient is not None for line in lines)
    planned = max((line.index + 1 for line in lines), default=0)
    so_far = (
        "" if planned == len(lines) else f" So far {len(lines)} of {planned}: the run was stopped and can be continued."
    )
    return (
        f"# A campaign of {len(lines)} problems\n\n"
        f"Seed {about['seed']}, {last['date'][:10]}, commit {commits}, torch {last['versions']['torch']}, "
        f"{last['cpu']}, "
        f"{last['capability']}.{so_far}\n\n"
        f"    PYTHONPATH=property_tests python -m campaign run --problems {planned} --seed {about['seed']}\n"
        f"    PYTHONPATH=property_tests python -m campaign show --seed {about['seed']} --index N      # any problem "
        "again\n\n"
        "Every problem is a random config (all options crossed, all dtypes), random weights and inputs; "
        "each output is compared entry by entry with the bound "
        f"of `moe_fn.testing.error_bound` for this problem. Gradients of {gradients} problems "
        "were compared with "
        f"the reference's. {undecided}: their bound includes both. A gate with "
        "normed or transformed inputs is compared with the bound of its logits, and the layer with the reference of "
        "these logits; "
        "laws, whose gate may round differently, are checked for tokens where moving the logits within their bound "
        "changes no choice.\n"
    )


def _failures(lines: Sequence[Line]) -> str:
    bad = [line for line in lines if line.failures]
    rows = [
        f"- `PYTHONPATH=property_tests python -m campaign show --seed {line.seed} --index {line.index}`: "
        f"{'; '.join(line.failures)}"
        for line in bad
    ]
    return f"## Failures: {len(bad)}\n\n" + "\n".join(rows or ["None."]) + "\n"


def _laws(lines: Sequence[Line]) -> str:
    rows = []
    for law in ("the layer", *LAWS):
        shares = [line.of_bound[law] for line in lines if law in line.of_bound]
        rows.append([law, str(len(shares)), number(max(shares, default=None))])
    gradients = by([line for line in lines if line.gradient is not None], lambda line: line.features["dtype"])
    worst = {dtype: max(line.gradient or 0.0 for line in group) for dtype, group in gradients.items()}
    rows += [
        [f"gradients, {dtype} (relative RMS)", str(len(gradients[dtype])), number(worst[dtype])]
        for dtype in DTYPES
        if dtype in worst
    ]
    return (
        "## Laws\n\nHow often each was checked, and the worst error as a share of the bound (at most 1).\n\n"
        + table(["law", "problems", "worst"], rows)
    )


def _met(coverage: Coverage) -> int:
    return coverage.possible - len(coverage.missing)


def _coverage(coverage: Coverage) -> str:
    rows = []
    for option in AXES:
        mine = [pair for pair in coverage.met if option in (pair[0], pair[2])]
        missing = [pair for pair in coverage.missing if option in (pair[0], pair[2])]
        rarest = min((coverage.met[pair] for pair in mine), default=0)
        rows.append([option, str(len(AXES[option])), str(len(mine)), str(len(mine) + len(missing)), str(rarest)])
    shown = [f"- {a}={b} with {c}={d}" for a, b, c, d in coverage.missing[:_MISSING_SHOWN]]
    more = len(coverage.missing) - len(shown)
    return (
        "## Pairs of options\n\n"
        f"{_met(coverage)} of {coverage.possible} pairs occurred; the rules exclude {coverage.excluded} more.\n\n"
        + table(["option", "values", "pairs that occurred", "pairs possible", "the rarest pair"], rows)
        + (
            "\nNever occurred:\n\n" + "\n".join(shown) + (f"\n- and {more} more" if more else "") + "\n"
            if shown
            else ""
        )
    )


def _errors(lines: Sequence[Line]) -> str:
    by_dtype = by(lines, lambda line: line.features["dtype"])
    head = ["option", "value", *itertools.chain.from_iterable((dtype, "of bound") for dtype in DTYPES)]
    rows = []
    for option in (option for option in AXES if option != "dtype"):
        for value in AXES[option]:
            cells = []
            for dtype in DTYPES:
                summary = summary_of([line for line in by_dtype.get(dtype, []) if line.features[option] == value])
                cells += [number(summary.worst), number(summary.share)] if summary.problems else ["-", "-"]
            rows.append([option, value, *cells])
    return (
        "## Worst errors by dtype and option\n\n"
        "Largest relative RMS error of an output against float64 (problems without ties; "
        "where terms cancel it is large, and so is its "
        "bound), and the largest share of the bound that an entry used (all problems).\n\n" + table(head, rows)
    )
