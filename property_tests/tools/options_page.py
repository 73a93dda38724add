"""docs/options.md: the table of all values of the options that are names, made of the types and tables of the configs.

`python -m tools.options_page` writes it anew.
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
# Options whose values are rows of a table; values of the others are those of their types.
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
    """Names that a field may hold, by its type; "another number" and classes of nested configs are no names."""
    found: dict[str, set[str]] = {}
    for where, value in there_are():
        if isinstance(value, str) and value.islower() and " " not in value:
            found.setdefault(where, set()).add(value)
    return found


def table() -> str:
    """The table, a line for each field."""
    rows = {where: sorted(names) for where, names in names_by_type().items()}
    rows |= {where: list(names) for where, names in TABLES.items()}
    lines = [f"| `{where}` | {', '.join(f'`{name}`' for name in rows[where])} |" for where in sorted(rows)]
    return "\n".join(["| field | values |", "|---|---|", *lines]) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    return _TABLE.sub(lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
