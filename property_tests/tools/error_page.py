"""docs/errors.md: wrong calls and what they raise, each run.

`PYTHONPATH=.:property_tests python -m tools.error_page` writes the messages anew.
"""

import re
from collections.abc import Iterator
from typing import Any

from tools import ROOT

PAGE = ROOT / "docs" / "errors.md"
_ROW = re.compile(r"^\| `(?P<call>.+?)` \| (?P<words>.*) \|$")


def names_of(page: str) -> dict[str, Any]:
    """What the page's block of Python defines."""
    names: dict[str, Any] = {"__name__": __name__}  # the module of the page's lambdas, which torch.jit.trace asks for
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    exec(block.group(1), names)
    return names


def rows_of(page: str) -> Iterator[tuple[str, str]]:
    """Calls and words of the tables."""
    for line in page.splitlines():
        if match := _ROW.match(line):
            yield match["call"].replace(r"\|", "|"), match["words"]


def raised_by(call: str, names: dict[str, Any]) -> str:
    """The words of the ValueError that a call raises, as the page shows them; any other error goes on."""
    try:
        eval(call, dict(names))
    except ValueError as error:
        return str(error).replace("\n", " ").replace("|", r"\|")
    return "nothing"


def written(page: str) -> str:
    """The page with every message as it is now."""
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
