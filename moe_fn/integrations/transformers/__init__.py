"""moe_fn inside Hugging Face transformers (`pip install "moe_fn[transformers]"`).

`register`     model.set_experts_implementation("moe_fn"): the model's own routers and blocks, with our experts
`from_block`   a live block as a config and weights
`replace_moe_blocks`, `restore_moe_blocks`   whole blocks, routing included, in place
"""

from moe_fn.integrations.transformers.blocks import from_block
from moe_fn.integrations.transformers.experts import register
from moe_fn.integrations.transformers.replace import replace_moe_blocks, restore_moe_blocks

__all__ = ["from_block", "register", "replace_moe_blocks", "restore_moe_blocks"]
