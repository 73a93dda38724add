"""The whole MoE layer: the composition of the stages, and the ways to run it (eager, chunked, as one op)."""
