"""The rows of the zoo as parameters of pytest."""

from collections.abc import Sequence

import pytest

from shared_tests.zoo.row import BlockRow


def each_row(rows: Sequence[BlockRow]) -> pytest.MarkDecorator:
    """Parametrizes a test by `row`: the first variant of each family and router in make test, the others in
    make test-thorough.
    """
    first = {(row.family, row.block, row.routing, row.takes): row for row in reversed(rows)}.values()
    params = [pytest.param(row, id=row.name, marks=() if row in first else pytest.mark.thorough) for row in rows]
    return pytest.mark.parametrize("row", params)
