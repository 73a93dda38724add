"""Value checks of the configs: each names the field, what came and what was expected."""

import math
from collections.abc import Collection


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if type(value) is not int or value < minimum or (maximum is not None and value > maximum):
        wanted = f"an int >= {minimum}" if maximum is None else f"an int in {minimum}..{maximum}"
        raise ValueError(f"{name} is {value!r}; expected {wanted}")


def check_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} is {value!r}; expected True or False")


def check_float(name: str, value: object, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < minimum or value <= above:  # type: ignore[arg-type, operator]
        bound = f" > {above}" if above > -math.inf else f" >= {minimum}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {value!r}; expected a finite number{bound}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
