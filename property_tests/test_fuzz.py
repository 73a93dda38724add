"""Two seconds of `make fuzz`, which searches for crashes on damaged configs and checkpoints.

Each crash that it found is a case in the tables of invalid input.
"""

import importlib.util
import random

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed")


@pytest.mark.parametrize(("target", "count"), [("config", 300), ("family", 500), ("checkpoint", 40), ("adapter", 60)])
def test_damage_is_refused_or_read(target: str, count: int) -> None:
    """Damaged input raises ValueError or nothing. Some of it must raise and some must load, so that both are tested."""
    from fuzz.targets import TARGETS

    chance = random.Random(0)
    said = {TARGETS[target](chance.randbytes(chance.randrange(4, 40))).partition(":")[0] for _ in range(count)}
    assert said == {"read", "refused"}
