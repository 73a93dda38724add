"""Summaries of many problems: medians and worst cases of groups."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from campaign.checking import Line


@dataclass(frozen=True)
class Summary:
    """Relative RMS errors against float64, their bounds and shares of the bound, of problems without ties.

    share is of all problems, with ties: the largest |y - float64| / radius, over every entry and every law.
    """

    problems: int
    median: float | None
    worst: float | None
    median_bound: float | None
    share: float
    tied: int
    worst_tied: float | None


def summary_of(lines: Sequence[Line]) -> Summary:
    """Returns the summary of some problems."""
    decided = [line for line in lines if line.error is not None and not line.unbounded and not line.tied]
    tied = [line.error for line in lines if line.tied and line.error is not None]
    errors = [line.error for line in decided if line.error is not None]
    bounds = [line.bound for line in decided if line.bound is not None]
    return Summary(
        problems=len(lines),
        median=statistics.median(errors) if errors else None,
        worst=max(errors, default=None),
        median_bound=statistics.median(bounds) if bounds else None,
        share=max((share for line in lines for share in line.of_bound.values()), default=0.0),
        tied=sum(line.tied for line in lines),
        worst_tied=max(tied, default=None),
    )


def by(lines: Sequence[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    """Returns the problems grouped by a key."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return dict(groups)


def number(value: float | None) -> str:
    """Returns a number with two digits.

    >>> number(0.000123456), number(None), number(0.0)
    ('1.2e-04', '-', '0')
    """
    return "-" if value is None else "0" if value == 0 else f"{value:.2f}" if 0.01 <= value < 100 else f"{value:.1e}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
