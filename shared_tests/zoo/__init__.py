"""The zoo: every Mixture-of-Experts block of transformers, tiny and random, as the oracle of the
integration's tests.
"""

from shared_tests.zoo.build import make_block, make_config, make_input, randomise
from shared_tests.zoo.row import BlockResult, BlockRow
from shared_tests.zoo.run import run_block
from shared_tests.zoo.table_a import ROWS_A
from shared_tests.zoo.table_a_more import ROWS_A_MORE
from shared_tests.zoo.table_b import ROWS_B
from shared_tests.zoo.table_c import ROWS_C
from shared_tests.zoo.table_d import ROWS_D
from shared_tests.zoo.table_e import ROWS_E

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
