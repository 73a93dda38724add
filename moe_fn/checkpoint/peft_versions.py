"""Decides by peft's version whether A of an adapter has a product's inputs or outputs, if both have the same size.

PEFT reads the last dims of a parameter [E, m, n] as (inputs, outputs) or (outputs, inputs), independent of the model.
A has

    peft            model has [E, out, in]      [E, in, out], is_transposed      [E, in, out] without is_transposed
                                                                                 (Llama-4)
    up to 0.18      outputs                     inputs                           inputs
    0.19.0          outputs                     outputs                          inputs
    from 0.19.1     inputs                      inputs                           outputs

Source: ParamWrapper in peft 0.17.1, 0.18.0, 0.18.1, 0.19.0, 0.19.1, 0.20.0, 0.21.0, 0.21.1 and 0.21.2. Adapters of peft
up to 0.17 do not have a version; models of that time with all experts in one parameter stored them as [E, in, out].
"""

import re
from collections.abc import Iterable

from moe_fn.config import MoEConfig

_Release = tuple[int, int, int]
# Since this release: whether A has the outputs, for each of _MODELS.
_OF_OUTPUTS: tuple[tuple[_Release, tuple[bool, bool, bool]], ...] = (
    ((0, 0, 0), (True, False, False)),
    ((0, 19, 0), (True, True, False)),
    ((0, 19, 1), (False, False, True)),
)
_OUT_IN, _IN_OUT, _IN_OUT_SILENT = _MODELS = range(3)
_UNVERSIONED: _Release = (0, 17, 0)
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?P<rest>.*)", re.DOTALL)


def is_of_outputs(
    version: str | None, config: MoEConfig, weight_layout: str | None, gate_up_layout: str
) -> bool | None:
    """Whether A has the outputs in an adapter of this version of peft; None if that is not determined.

    weight_layout and gate_up_layout are the model's; None: the config's, unless it is quantized, because codes have
    another layout than floats.

    >>> config = MoEConfig(num_experts=4, top_k=1, hidden_size=8, intermediate_size=4)
    >>> is_of_outputs("0.18.1", config, None, "packed"), is_of_outputs("0.21.2", config, None, "packed")
    (True, False)
    """
    if version is None:
        releases: Iterable[_Release] = (_UNVERSIONED,)
        weight_layout = weight_layout or "in_out"
    else:
        releases = _releases(version)
    models = _models(config, weight_layout, gate_up_layout)
    rows = [[row for since, row in _OF_OUTPUTS if since <= release][-1] for release in releases]
    found = {row[model] for row in rows for model in models}
    return found.pop() if len(found) == 1 else None


def _models(config: MoEConfig, weight_layout: str | None, gate_up_layout: str) -> tuple[int, ...]:
    """The columns of the table that a model may be in; quantized models are not Llama-4."""
    if gate_up_layout == "interleaved" and weight_layout != "out_in":
        return (_IN_OUT,)  # gpt-oss: the only model of transformers with alternating gates and ups
    if weight_layout is None and config.quant is not None:
        return _OUT_IN, _IN_OUT
    return (_OUT_IN,) if (weight_layout or config.weight_layout) == "out_in" else (_IN_OUT, _IN_OUT_SILENT)


def _releases(version: str) -> list[_Release]:
    """The release of a version; for a development version the releases that it may behave like: 0.18.1.dev0 became
    0.19.0.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        return []
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    if not match["rest"] or match["rest"].startswith((".post", "+")):
        return [release]
    return [
        max((since for since, _ in _OF_OUTPUTS if since < release), default=release),
        release,
        (release[0], release[1] + 1, 0),
    ]
