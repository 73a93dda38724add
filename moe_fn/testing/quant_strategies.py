"""Hypothesis strategy of QuantConfigs over every quantization scheme."""

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from moe_fn.config.quant import ACTIVATION_SCHEMES, SCHEMES, ActivationQuantConfig, QuantConfig


@st.composite
def quants(draw: DrawFn, activations: bool = True, of_call: bool = True) -> QuantConfig:
    """Strategy of all valid combinations of scheme, granularity, zero points and rounding of activations.

    Groups and blocks are small, and odd ones occur.

    activations  False: weights only
    of_call      False: no scales that are shared by all rows of a call, which chunks and ranks do not support

    >>> from hypothesis import find
    >>> find(quants(), lambda quant: quant.granularity == "block").block_shape
    (1, 1)
    """
    scheme = draw(st.sampled_from(list(SCHEMES)))
    row = SCHEMES[scheme]
    granularity = draw(st.sampled_from(row.granularities))
    sizes = st.integers(1, 9)
    return QuantConfig(
        scheme=scheme,  # type: ignore[arg-type]
        granularity=granularity,  # type: ignore[arg-type]
        group_size=(row.group_size or draw(sizes)) if granularity == "group" else None,
        block_shape=(draw(sizes), draw(sizes)) if granularity == "block" else None,
        zero_points=row.zero_points and draw(st.booleans()),
        activations=draw(st.none() | _activations(row.activations, of_call))
        if activations and row.activations
        else None,
    )


@st.composite
def _activations(draw: DrawFn, schemes: tuple[str, ...], of_call: bool) -> ActivationQuantConfig:
    scheme = draw(st.sampled_from(schemes))
    row = ACTIVATION_SCHEMES[scheme]
    granularity = draw(st.sampled_from(row.granularities))
    groups = granularity == "group"
    may_be_static = granularity == "tensor" or row.has_global_scale
    static = may_be_static and ((granularity == "tensor" and not of_call) or draw(st.booleans()))
    return ActivationQuantConfig(
        scheme=scheme,  # type: ignore[arg-type]
        granularity=granularity,  # type: ignore[arg-type]
        group_size=(row.group_size or draw(st.integers(1, 9))) if groups else None,
        static=static,
        power_of_two_scales=row.power_of_two_scales and groups and draw(st.booleans()),
    )
