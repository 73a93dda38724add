"""Experts and Mixture-of-Experts blocks of Hugging Face transformers on moe_fn (`pip install "moe_fn[transformers]"`).

`register`     model.set_experts_implementation("moe_fn"): the model's routers and blocks with moe_fn's experts
`from_block`   a config and weights from a module
`replace_moe_blocks`, `restore_moe_blocks`   replaces whole blocks with their routing, in place
"""

from moe_fn.integrations.transformers.blocks import from_block
from moe_fn.integrations.transformers.experts import register
from moe_fn.integrations.transformers.replace import replace_moe_blocks, restore_moe_blocks

__all__ = ["from_block", "register", "replace_moe_blocks", "restore_moe_blocks"]
