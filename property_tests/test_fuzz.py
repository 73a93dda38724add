"""What `make fuzz` looks for at length, in two seconds.

What it found stands in the tables of wrong input, case by case.
"""

import importlib.util
import random

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")


@pytest.mark.parametrize(("target", "count"), [("config", 300), ("family", 500), ("checkpoint", 40), ("adapter", 60)])
def test_damage_is_refused_or_read(target: str, count: int) -> None:
    """Nothing but ValueError comes out; some of it is refused, and some is read, or nothing would be tested."""
    from fuzz.targets import TARGETS

    chance = random.Random(0)
    said = {TARGETS[target](chance.randbytes(chance.randrange(4, 40))).partition(":")[0] for _ in range(count)}
    assert said == {"read", "refused"}
