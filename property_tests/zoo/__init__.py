"""The zoo: every Mixture-of-Experts block of transformers, tiny and random, as the oracle of the
integration's tests.
"""

from zoo.build import make_block, make_config, make_input, randomise
from zoo.row import BlockResult, BlockRow
from zoo.run import run_block
from zoo.table_a import ROWS_A
from zoo.table_a_more import ROWS_A_MORE
from zoo.table_b import ROWS_B
from zoo.table_c import ROWS_C
from zoo.table_d import ROWS_D
from zoo.table_e import ROWS_E

ROWS = (*ROWS_A, *ROWS_A_MORE, *ROWS_B, *ROWS_C, *ROWS_D, *ROWS_E)
REFUSED = tuple(row for row in ROWS if row.refused)
TOKEN_CHOICE = tuple(row for row in ROWS if not row.refused)

__all__ = [
    "REFUSED",
    "ROWS",
    "TOKEN_CHOICE",
    "BlockResult",
    "BlockRow",
    "make_block",
    "make_config",
    "make_input",
    "randomise",
    "run_block",
]
