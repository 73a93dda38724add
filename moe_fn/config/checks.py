"""Value checks of the configs: each names the field, what came and what was expected."""

import math
from collections.abc import Collection

LARGEST = 2**63 - 1  # of any size, count or rank: what torch can hold


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if type(value) is not int or not minimum <= value <= (LARGEST if maximum is None else maximum):
        wanted = f"in {minimum}..{maximum}" if maximum is not None else f">= {minimum}, below 2^63" if _is_huge(value) else f">= {minimum}"
        raise ValueError(f"{name} is {value!r:.200}; expected an int {wanted}")


def check_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} is {value!r:.200}; expected True or False")


def check_float(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and not _is_huge(value)
    if not number or not math.isfinite(value) or value < minimum or value <= above:  # type: ignore[arg-type, operator]
        bound = f" > {above}" if above > -math.inf else f" >= {minimum}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {value!r:.200}; expected a finite number{bound}")


def _is_huge(value: object) -> bool:
    """Whether it is an int that no int64 holds, and perhaps no float."""
    return isinstance(value, int) and abs(value) > LARGEST


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r:.200}; expected one of {', '.join(map(repr, choices))}")
