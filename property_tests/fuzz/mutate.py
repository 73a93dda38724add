"""Damages values of JSON and the bytes of files."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from fuzz.choices import Choices

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
NESTED: Any = {}
for _ in range(300):
    NESTED = {"text_config": NESTED, "model_type": "x"}
# Values that may break parsers: other types, limits of integers and floats, names that are paths, patterns that take
# exponential time.
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 16, 32, 255, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**12, 10**30, 10**400,
    -(10**400), 0.0, -0.0,
    0.5, 1.5, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "128", "9" * 5000, "\ud800",
    "\0", "../x",
    "/etc/passwd", "x" * 5000, "re:(a+)+$", "re:(.*)*(.*)*(.*)*!", "re:.*.*.*.*.*.*.*.*!", "re:(", "re:a{99999999999}",
    "re:" + "(" * 3000,
    ".*(.*.*)*!", "*a" * 50, "\\d" * 100, "-:(.+)+!", "[", "1x", "32x16", "NaN", [], {}, [0], [1, 32], [16, 32], [[]],
    {"a": 1}, [None],
    [1.5, 2], ["Linear"], ["re:.*experts.*"], DEEP, NESTED,
)  # fmt: skip


def damaged_json(choices: Choices, value: Any, tokens: Sequence[str]) -> Any:
    """Returns the value with one change; `tokens` are keys and strings with a meaning for the reader."""
    root = [copy.deepcopy(value)]
    parent, key = root, 0
    for _ in range(6):  # down to a place
        child = parent[key]
        keys = list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
        if not keys or choices.below(4) == 0:
            break
        parent, key = child, choices.one_of(keys)
    _change(choices, parent, key, tokens)
    return root[0]


def _change(choices: Choices, parent: Any, key: Any, tokens: Sequence[str]) -> None:
    match choices.below(8):
        case 0 | 1:
            parent[key] = copy.deepcopy(choices.one_of(NASTY))
        case 2:
            parent[key] = choices.one_of(tokens)
        case 3 if isinstance(parent, dict):
            del parent[key]
        case 4 if isinstance(parent, dict):
            parent[choices.one_of(tokens)] = parent.pop(key)
        case 5 if isinstance(parent[key], dict):
            parent[key][choices.one_of(tokens)] = copy.deepcopy(choices.one_of(NASTY))
        case 6 if isinstance(parent[key], int):
            parent[key] += choices.one_of((1, -1, 31, -31, 10**6))
        case 7:
            parent[key] = [parent[key]] * choices.below(4)
        case _:
            parent[key] = copy.deepcopy(choices.one_of(NASTY))


def damaged_bytes(choices: Choices, content: bytes, end: int) -> bytes:
    """Returns the content with a few bytes before `end` changed, removed or inserted, or with the rest cut off."""
    at = choices.below(max(end, 1))
    match choices.below(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[at + 1 + choices.below(16) :]
        case 2:
            return content[:at] + bytes(choices.below(256) for _ in range(1 + choices.below(8))) + content[at:]
        case _:
            return content[:at] + bytes([choices.below(256)]) + content[at + 1 :]


def dumped(value: Any) -> bytes:
    """Returns JSON as Python's own writer makes it, with NaN and infinity."""
    return json.dumps(value).encode()
