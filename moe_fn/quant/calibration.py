"""What is known of the inputs of the experts' products before their weights are rounded."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Of the inputs of gate_up [.., Hx] and of down [.., I], as `moe_fn.calibrate` has seen them."""

    gate_up_mean_square: Tensor  # [E, Hx] float32
    gate_up_amax: Tensor  # [E]
    down_mean_square: Tensor  # [E, I]
    down_amax: Tensor  # [E]
