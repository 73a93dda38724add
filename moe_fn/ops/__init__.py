"""Ops: the only users of torch.library. Each says why it is not plain tensor code, and what would remove it."""
