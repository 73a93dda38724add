"""Config of quantization: the codes and scales of the experts' weights, and the rounding of their inputs."""

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe_fn.checks import check_bool, check_choice, check_int

Scheme = Literal["fp8_e4m3", "int8", "int4", "mxfp4", "mxfp8", "nvfp4"]
Granularity = Literal["tensor", "channel", "group", "block"]
ActivationScheme = Literal["fp8_e4m3", "int8", "mxfp8", "mxfp4", "nvfp4"]
ActivationGranularity = Literal["tensor", "token", "group"]


@dataclass(frozen=True)
class Element:
    """A number format of codes: bits of a code, and dtype of a tensor of codes; two codes of 4 bits share a byte.

    `moe_fn.quant.numbers` decodes codes; `moe_fn.reference.quant` has its own decoders.
    """

    bits: int
    dtype: torch.dtype


ELEMENTS: dict[str, Element] = {
    "e4m3": Element(8, torch.float8_e4m3fn),
    "int8": Element(8, torch.int8),
    "int4": Element(4, torch.uint8),
    "e2m1": Element(4, torch.uint8),
}
# Dtypes of scales; "e8m0" are exponents, "e4m3" have one float32 scale above them.
SCALES: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.bfloat16, torch.float16),
    "e8m0": (torch.uint8,),
    "e4m3": (torch.float8_e4m3fn,),
}


@dataclass(frozen=True)
class CodeRow:
    """Codes and their scales: a key of ELEMENTS, a key of SCALES, granularities, and the group size (None: any)."""

    element: str
    scale: str
    granularities: tuple[str, ...]
    group_size: int | None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return ELEMENTS[self.element].bits

    @property
    def has_global_scale(self) -> bool:
        """Whether there is a float32 scale above the scales."""
        return self.scale == "e4m3"


@dataclass(frozen=True)
class SchemeRow(CodeRow):
    """Weights: also whether codes may have zero points, and the schemes of activations that go with them."""

    zero_points: bool = False
    activations: tuple[str, ...] = ()


@dataclass(frozen=True)
class ActivationRow(CodeRow):
    """Inputs of products: also whether scales of groups may be powers of two."""

    power_of_two_scales: bool = False


_ANY = get_args(Granularity)
SCHEMES: dict[str, SchemeRow] = {
    "fp8_e4m3": SchemeRow("e4m3", "float", _ANY, None, False, ("fp8_e4m3",)),
    "int8": SchemeRow("int8", "float", _ANY, None, True, ("int8",)),
    "int4": SchemeRow("int4", "float", _ANY, None, True, ("int8", "fp8_e4m3")),
    "mxfp4": SchemeRow("e2m1", "e8m0", ("group",), 32, False, ("mxfp4", "mxfp8", "fp8_e4m3")),
    "mxfp8": SchemeRow("e4m3", "e8m0", ("group",), 32, False, ("mxfp8",)),
    "nvfp4": SchemeRow("e2m1", "e4m3", ("group",), 16, False, ("nvfp4",)),
}
ACTIVATION_SCHEMES: dict[str, ActivationRow] = {
    "fp8_e4m3": ActivationRow("e4m3", "float", ("tensor", "token", "group"), None, True),
    "int8": ActivationRow("int8", "float", ("tensor", "token", "group"), None),
    "mxfp8": ActivationRow("e4m3", "e8m0", ("group",), 32),
    "mxfp4": ActivationRow("e2m1", "e8m0", ("group",), 32),
    "nvfp4": ActivationRow("e2m1", "e4m3", ("group",), 16),
}


@dataclass(frozen=True, kw_only=True)
class ActivationQuantConfig:
    """Rounding of the inputs of both products, with straight-through gradients.

    granularity  inputs that share a scale: all rows of a call ("tensor"), a row ("token"), `group_size` numbers of a
                 row ("group")
    static       the scale is a weight, one for each expert (nvfp4: the global scale); otherwise each call computes it
    power_of_two_scales  scales are rounded up to powers of two (fp8 groups: DeepSeek's ue8m0)

    >>> ActivationQuantConfig(scheme="mxfp8", granularity="group", group_size=32).group_size
    32
    """

    scheme: ActivationScheme
    granularity: ActivationGranularity
    group_size: int | None = None
    static: bool = False
    power_of_two_scales: bool = False

    def __post_init__(self) -> None:
        where = "ActivationQuantConfig"
        check_choice(f"{where}.scheme", self.scheme, tuple(ACTIVATION_SCHEMES))
        row = self.row
        check_choice(f"{where}.granularity", self.granularity, row.granularities)
        check_group_size(where, self.granularity, self.group_size, row.group_size)
        for name in ("static", "power_of_two_scales"):
            check_bool(f"{where}.{name}", getattr(self, name))
        if self.static and self.granularity != "tensor" and not row.has_global_scale:
            raise ValueError(
                f"{where}.static=True with granularity={self.granularity!r}; expected granularity='tensor', or "
                + " or ".join(name for name, row in ACTIVATION_SCHEMES.items() if row.has_global_scale)
            )
        if self.power_of_two_scales and not (row.power_of_two_scales and self.granularity == "group"):
            raise ValueError(
                f"{where}.power_of_two_scales=True with {self.scheme!r}, {self.granularity!r}; "
                "expected groups of "
                + " or ".join(n for n, row in ACTIVATION_SCHEMES.items() if row.power_of_two_scales)
            )

    @property
    def row(self) -> ActivationRow:
        """The row of the scheme."""
        return ACTIVATION_SCHEMES[self.scheme]

    @property
    def is_of_call(self) -> bool:
        """Whether one scale is computed from all rows of a call."""
        return self.granularity == "tensor" and not self.static


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantization of gate_up and down: W[e, n, k] = (q - zero_point) * scale, with a scale for each tile of a matrix
    (`QuantWeights` has the shapes).

    scheme       fp8_e4m3, int8, int4; mxfp4 and mxfp8 (OCP: a power-of-two scale for 32 inputs); nvfp4 (an fp8 scale
                 for 16 inputs and a global scale)
    granularity  the tile: "tensor": all outputs and inputs, gate and up separate; "channel": one output; "group":
                 `group_size` inputs of one output; "block": `block_shape` = (outputs, inputs)
    zero_points  for int4 and int8: a zero point for each scale; codes are then unsigned
    activations  rounding of the inputs; None: inputs are not rounded ("weight-only", w8a16, w4a16)

    Raises ValueError for combinations that no published format has.

    >>> QuantConfig(scheme="int4", granularity="group", group_size=128).tile
    (1, 128)
    >>> QuantConfig(scheme="fp8_e4m3", granularity="block", block_shape=(128, 128)).tile
    (128, 128)
    """

    scheme: Scheme
    granularity: Granularity
    group_size: int | None = None
    block_shape: tuple[int, int] | None = None
    zero_points: bool = False
    activations: ActivationQuantConfig | None = None

    def __post_init__(self) -> None:
        check_choice("QuantConfig.scheme", self.scheme, tuple(SCHEMES))
        row = SCHEMES[self.scheme]
        check_choice("QuantConfig.granularity", self.granularity, row.granularities)
        check_group_size("QuantConfig", self.granularity, self.group_size, row.group_size)
        if isinstance(self.block_shape, list):  # from JSON
            object.__setattr__(self, "block_shape", tuple(self.block_shape))
        self._check_block()
        check_bool("QuantConfig.zero_points", self.zero_points)
        if self.zero_points and not row.zero_points:
            having = " or ".join(sorted(name for name, other in SCHEMES.items() if other.zero_points))
            raise ValueError(f"QuantConfig.zero_points=True with scheme={self.scheme!r}; expected {having}")
        if self.activations is not None:
            if not isinstance(self.activations, ActivationQuantConfig):
                raise ValueError(
                    f"QuantConfig.activations is {self.activations!r}; expected an ActivationQuantConfig or None"
                )
            check_choice(
                f"QuantConfig.activations.scheme, with scheme={self.scheme!r},",
                self.activations.scheme,
                row.activations,
            )
        # Not a field: ops take the config as JSON. Made here because Dynamo cannot trace the json module.
        object.__setattr__(self, "_json", json.dumps(dataclasses.asdict(self), sort_keys=True))

    def _check_block(self) -> None:
        block = self.block_shape
        if (self.granularity == "block") != (block is not None):
            raise ValueError(
                f"QuantConfig.block_shape is {block!r} with granularity={self.granularity!r}; "
                "expected one only with 'block'"
            )
        if block is not None:
            if not isinstance(block, tuple) or len(block) != 2:
                raise ValueError(f"QuantConfig.block_shape is {block!r}; expected (outputs, inputs)")
            for size in block:
                check_int("QuantConfig.block_shape", size, 1)

    @property
    def json(self) -> str:
        """The config as JSON; `quant_of_json` is the inverse."""
        return self._json  # type: ignore[attr-defined, no-any-return]

    @property
    def rounds_by_call(self) -> bool:
        """Whether inputs share a scale that is computed from all rows of a call: a token's output then depends on the
        other tokens.
        """
        return self.activations is not None and self.activations.is_of_call

    @property
    def row(self) -> SchemeRow:
        """The row of SCHEMES."""
        return SCHEMES[self.scheme]

    @property
    def tile(self) -> tuple[int | None, int | None]:
        """(outputs, inputs) that share a scale; None: all."""
        if self.granularity == "block" and self.block_shape is not None:
            return self.block_shape
        return {"tensor": (None, None), "channel": (1, None)}.get(self.granularity, (1, self.group_size))

    @property
    def per_byte(self) -> int:
        """Number of codes in a byte."""
        return 8 // self.row.bits


def check_group_size(where: str, granularity: str, size: object, fixed: int | None) -> None:
    """Raises ValueError unless group_size is given exactly with granularity="group", with the scheme's fixed size."""
    if granularity != "group":
        if size is not None:
            raise ValueError(f"{where}.group_size is {size!r} with granularity={granularity!r}; expected None")
        return
    check_int(f"{where}.group_size", size, 1)
    if fixed is not None and size != fixed:
        raise ValueError(f"{where}.group_size is {size!r}; expected {fixed}, which the scheme fixes")


@functools.lru_cache
def quant_of_json(text: str) -> QuantConfig:
    """Returns the config of an op's JSON argument. Cached."""
    values = json.loads(text)
    activations = values.pop("activations")
    return QuantConfig(**values, activations=None if activations is None else ActivationQuantConfig(**activations))
