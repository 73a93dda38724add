"""What ranks run in processes of their own, imported there by name.

cases     layers on meshes, sharded against unsharded; layers the options that those leave out; loaded from checkpoints
eplb      moves of experts; faults ranks that die, hang or differ; hosts DDP and FSDP2
"""
