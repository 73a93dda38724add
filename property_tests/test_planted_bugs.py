"""Every law detects a planted bug, and every planted bug is detected by the law that it names."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from planted.balance import BUGS as OF_BALANCE
from planted.bugs import BUGS as OF_THE_LAYER
from planted.bugs import PlantedBug, planted
from planted.campaign import BUGS as OF_THE_CAMPAIGN
from planted.families import BUGS as OF_FAMILIES
from planted.lists import BUGS as OF_LISTS
from planted.nan import BUGS as OF_NAN
from planted.quant import BUGS as OF_QUANT

FOLDER = Path(__file__).parent
FILES = (
    "test_route",
    "test_replay",
    "test_dispatch",
    "test_experts",
    "test_combine",
    "test_around_the_experts",
    "test_preparing",
    "test_layer",
    "test_not_finite",
    "test_eplb",
    "test_quant",
    "test_lora",
    "test_campaign",
    "test_batch_invariance",
    "test_integer_dtypes",
    "test_balance_dtypes",
)
WITH = {
    "transformers": ("test_transformers_laws", "test_family_laws"),
    "safetensors": ("test_checkpoint", "test_checkpoint_lora", "test_checkpoint_published", "test_module_lists"),
}
FILES += tuple(
    file for package, files in WITH.items() if importlib.util.find_spec(package) is not None for file in files
)
BUGS = OF_THE_LAYER + OF_BALANCE + OF_QUANT + OF_NAN + OF_THE_CAMPAIGN + OF_FAMILIES + OF_LISTS
MODULES: tuple[ModuleType, ...] = tuple(importlib.import_module(name) for name in FILES)
LAWS = {
    name.removeprefix("test_"): value
    for module in MODULES
    for name, value in vars(module).items()
    if hasattr(value, "strategies")
}
QUICK = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.law}: {bug.what}")
def test_the_law_kills_the_bug(bug: PlantedBug) -> None:
    law = LAWS[bug.law]
    with planted(bug), pytest.raises(Exception) as caught:
        QUICK(given(*law.strategies)(law.check))()
    assert isinstance(caught.value, AssertionError | RuntimeError | IndexError | ValueError), caught.value


def test_every_law_kills_a_bug() -> None:
    assert set(LAWS) == {bug.law for bug in BUGS}
    assert len(LAWS) >= 25
