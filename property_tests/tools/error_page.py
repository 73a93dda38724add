"""Generates the messages of docs/errors.md by running its wrong calls.

PYTHONPATH=.:property_tests python -m tools.error_page
"""

import re
from collections.abc import Iterator
from typing import Any

from tools import ROOT

PAGE = ROOT / "docs" / "errors.md"
_ROW = re.compile(r"^\| `(?P<call>.+?)` \| (?P<message>.*) \|$")


def names_of(page: str) -> dict[str, Any]:
    """Runs the page's block of Python. Returns the names that it defines."""
    names: dict[str, Any] = {"__name__": __name__}  # the module of the page's lambdas, which torch.jit.trace looks up
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    exec(block.group(1), names)
    return names


def rows_of(page: str) -> Iterator[tuple[str, str]]:
    """Yields (call, message) of every row of the tables."""
    for line in page.splitlines():
        if match := _ROW.match(line):
            yield match["call"].replace(r"\|", "|"), match["message"]


def raised_by(call: str, names: dict[str, Any]) -> str:
    """Returns the message of the ValueError that a call raises, escaped for the page. Other errors are not caught."""
    try:
        eval(call, dict(names))
    except ValueError as error:
        return str(error).replace("\n", " ").replace("|", r"\|")
    return "nothing"


def written(page: str) -> str:
    """Returns the page with current messages."""
    names = names_of(page)
    lines = []
    for line in page.splitlines():
        match = _ROW.match(line)
        lines.append(line if match is None else _row(match["call"], names))
    return "\n".join(lines) + "\n"


def _row(call: str, names: dict[str, Any]) -> str:
    return f"| `{call}` | {raised_by(call.replace(chr(92) + '|', '|'), names)} |"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
