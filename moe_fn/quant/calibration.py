"""Calibration statistics: mean squares and largest magnitudes of the inputs of the experts' products."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Statistics of the inputs of gate_up [.., Hx] and of down [.., I], returned by `moe_fn.calibrate`."""

    gate_up_mean_square: Tensor  # [E, Hx] float32
    gate_up_amax: Tensor  # [E]
    down_mean_square: Tensor  # [E, I]
    down_amax: Tensor  # [E]
