"""What computes the experts, visibly: no environment variable, no silent fall-back."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """One row of `backends()`."""

    name: str
    available: bool
    devices: tuple[str, ...]
    chosen_by_auto_on: tuple[str, ...]
    reason: str


def backends() -> tuple[BackendInfo, ...]:
    """What `MoEConfig.backend` may name, whether it runs here, where "auto" chooses it, and why.

    >>> [info.name for info in backends() if info.available]
    ['torch']
    """
    return (
        BackendInfo(
            name="torch",
            available=True,
            devices=("cpu", "cuda"),
            chosen_by_auto_on=("cpu", "cuda"),
            reason=f"plain torch {torch.__version__}: one product per expert on the CPU, fixed blocks of rows on other devices",
        ),
    )
