"""A layer that ranks of torch.distributed share: sharding of weights, formats of dispatch, and what is summed when,
what it sends.

The config says how (`moe_fn.ParallelConfig`), the weights are this rank's (`shard_weights`), and moe_forward is called
as ever.
"""

from moe_fn.parallel.agreement import check_ranks_agree
from moe_fn.parallel.gathering import gather_tokens
from moe_fn.parallel.sharding import join_weights, shard_weights
from moe_fn.parallel.traffic import Message, Traffic, traffic

__all__ = ["Message", "Traffic", "check_ranks_agree", "gather_tokens", "join_weights", "shard_weights", "traffic"]
