"""Generates a table of docs/options.md: all names that options can have, from the types and tables of the configs.

PYTHONPATH=.:property_tests python -m tools.options_page
"""

import re
from collections.abc import Iterable
from pathlib import Path

from options import there_are

from moe_fn.config.activation import FUNCTIONS, PRESETS
from moe_fn.config.parallel import DISPATCHES
from moe_fn.config.quant import ACTIVATION_SCHEMES, SCHEMES
from moe_fn.config.router import SCORINGS

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
# Options whose values are rows of a table; the values of others are in their types.
TABLES: dict[str, Iterable[str]] = {
    "ActivationConfig.function": FUNCTIONS,
    "RouterConfig.scoring": SCORINGS,
    "QuantConfig.scheme": SCHEMES,
    "ParallelConfig.dispatch": DISPATCHES,
    "ActivationQuantConfig.scheme": ACTIVATION_SCHEMES,
    "MoEConfig.activation": PRESETS,
    "SharedExpertsConfig.activation": PRESETS,
}
_TABLE = re.compile(r"(?<=<!-- values of options: written by make pages -->\n).*?(?=<!-- end -->)", re.DOTALL)


def names_by_type() -> dict[str, set[str]]:
    """The names that a field can have, by its type; classes of nested configs and "another number" are not names."""
    found: dict[str, set[str]] = {}
    for where, value in there_are():
        if isinstance(value, str) and value.islower() and " " not in value:
            found.setdefault(where, set()).add(value)
    return found


def table() -> str:
    """Returns the table, with a line for each field."""
    rows = {where: sorted(names) for where, names in names_by_type().items()}
    rows |= {where: list(names) for where, names in TABLES.items()}
    lines = [f"| `{where}` | {', '.join(f'`{name}`' for name in rows[where])} |" for where in sorted(rows)]
    return "\n".join(["| field | values |", "|---|---|", *lines]) + "\n"


def written(page: str) -> str:
    """Returns the page with the current table."""
    return _TABLE.sub(lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
