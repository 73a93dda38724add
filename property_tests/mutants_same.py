"""Mutants that no test can kill, for they are the same program: why, and which."""

import re

# reason: (file, pattern of the change) ...
SAME: dict[str, tuple[tuple[str, str], ...]] = {}


def reason_of(file: str, change: str) -> str | None:
    """Why the mutant is the same program; None if it is not known to be."""
    for reason, places in SAME.items():
        if any(file.endswith(name) and re.search(pattern, change) for name, pattern in places):
            return reason
    return None
