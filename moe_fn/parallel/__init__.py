"""Expert, tensor and sequence parallelism over ranks of torch.distributed: sharding of weights, formats of dispatch,
agreement of ranks, traffic.

`moe_fn.ParallelConfig` chooses the parallelism, `shard_weights` returns a rank's weights, and moe_forward is called as
on one rank.
"""

from moe_fn.parallel.agreement import check_ranks_agree
from moe_fn.parallel.gathering import gather_tokens
from moe_fn.parallel.sharding import join_weights, shard_weights
from moe_fn.parallel.traffic import Message, Traffic, traffic

__all__ = ["Message", "Traffic", "check_ranks_agree", "gather_tokens", "join_weights", "shard_weights", "traffic"]
