"""Functions that make the rows of the tables: one call per family, one entry per variant; and common arguments."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shared_tests.zoo.row import BlockRow

# Arguments of configs under the keys that several families share. Small sizes that differ from each other.
MIXTRAL = {"hidden_size": 64, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}
QWEN_SHARED = {**QWEN, "shared_expert_intermediate_size": 20}
DEEPSEEK = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "num_hidden_layers": 2,
}
GROUPS = {"n_group": 4, "topk_group": 2}  # 8 experts in 4 groups of 2; 3 are chosen from the 4 experts of 2 groups


def without(arguments: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns the arguments except these names."""
    return {name: value for name, value in arguments.items() if name not in names}


def family(
    table: str,
    name: str,
    config: str,
    block: str,
    sizes: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    *like: BlockRow,
) -> tuple[BlockRow, ...]:
    """Returns rows of one block class, one for each variant; `like` is at most one row that gives the other fields."""
    pattern = like[0] if like else ROW
    row = replace(pattern, table=table, family=name, config=config, block=block, sizes=sizes)
    return tuple(replace(row, variant=variant, options=options) for variant, options in variants.items())


def twins(rows: tuple[BlockRow, ...], other_of_variant: Mapping[str, str]) -> tuple[BlockRow, ...]:
    """Returns the rows with `same_numbers_as` set: their options are ignored, or have an effect in bfloat16 only."""
    return tuple(replace(row, same_numbers_as=other_of_variant.get(row.variant, "")) for row in rows)


ROW = BlockRow("", "", "", "", "", {}, {})
