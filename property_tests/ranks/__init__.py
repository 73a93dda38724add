"""Functions that run on each rank in real processes, which import them by name.

cases     layers on meshes, sharded against unsharded
layers    layers with the options that `cases` does not have
loaded    parts of checkpoints, loaded by each rank
eplb      moves of experts
faults    ranks that die, hang or differ
hosts     DDP and FSDP2
"""
