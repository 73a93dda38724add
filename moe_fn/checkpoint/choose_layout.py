"""Chooses the row of the layout table that a block is stored in: by model_type and tensor names, then by shapes."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from moe_fn.checkpoint.folder import (
    Checkpoint,
    Headers,
    dtype_of_floats,
    full_name,
    model_types,
    quant_dict_of,
    read_headers,
    tensors_below,
)
from moe_fn.checkpoint.layout import LAYOUTS, Layout, of_first_expert
from moe_fn.checkpoint.match import Plan, beginnings_of, match, quantized, strangers
from moe_fn.checkpoint.quantized.formats import CODES_SUFFIXES, FUSED_SUFFIXES, QuantDict
from moe_fn.checkpoint.quantized.layout import EXPERTS, quantized_layout
from moe_fn.checkpoint.safetensors_files import TensorInfo
from moe_fn.config import MoEConfig, QuantConfig

_SHOWN = 8  # problems listed in one message


def layout_of_name(name: str) -> Layout:
    """The row of the layout table with this name.

    >>> layout_of_name("mixtral").anchor
    'experts.{e}.w2.weight'
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"layout is {name!r}; expected one of {', '.join(repr(layout.name) for layout in LAYOUTS)}")


def layouts_of_family(types: Iterable[str]) -> tuple[Layout, ...]:
    """The rows of these model_types; all rows if none of the types is known."""
    types = set(types)
    return tuple(layout for layout in LAYOUTS if types & set(layout.families)) or LAYOUTS


def headers_of_block(checkpoint: Checkpoint, prefix: str) -> Headers:
    """Headers of all files that hold a tensor of the block in any layout."""
    beginnings = tuple({beginning for layout in LAYOUTS for beginning in beginnings_of(layout, prefix)})
    return read_headers(
        checkpoint, sorted({file for name, file in checkpoint.file_of_tensor.items() if name.startswith(beginnings)})
    )


def plan_of_block(
    checkpoint: Checkpoint, headers: Headers, prefix: str, config: MoEConfig, layout: Layout | str | None
) -> Plan:
    """The plan for reading a block.

    Raises ValueError that lists every missing or unexpected tensor, and every wrong shape or dtype with the expected
    one.
    """
    where = f"{checkpoint.folder}: {prefix}"
    rows = rows_of_block(checkpoint, prefix, layout)
    tensors = _tensors_of_rows(checkpoint, headers, prefix, rows)
    if not any(name.startswith(f"{prefix}.") for name in tensors):
        raise ValueError(f"{where} is not the prefix of any tensor's name; expected the prefix of a block")
    quant_dict = quant_dict_of(checkpoint)
    if quant_dict is not None:
        rows = _quantized_rows(where, rows, prefix, quant_dict, config, tensors)
    elif names := quantized(prefix, LAYOUTS, tensors):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"{where} has tensors of a quantized model ({shown}), but config.json has no quantization_config; "
            "expected one"
        )
    elif config.quant is not None:
        raise ValueError(f"{where} is not quantized, but config.quant is {config.quant!r}; expected None")
    plan = _only_fit(where, rows, prefix, config, tensors)
    decoded = {path: dtype_of_floats(checkpoint.config) for path, _ in plan.layout.methods if path not in EXPERTS}
    return dataclasses.replace(plan, dtypes={**plan.dtypes, **decoded})


def rows_of_block(checkpoint: Checkpoint, prefix: str, layout: Layout | str | None) -> tuple[Layout, ...]:
    """The rows that a block may be stored in, as they are without quantization."""
    if layout is None:
        return _rows_here(layouts_of_family(model_types(checkpoint.config)), checkpoint, prefix)
    return (layout_of_name(layout) if isinstance(layout, str) else layout,)


def quant_of_block(checkpoint: Checkpoint, prefix: str, rows: Sequence[Layout], num_experts: int) -> QuantConfig | None:
    """The quantization of a block's experts, from quantization_config and the files' headers; None without one."""
    quant_dict = quant_dict_of(checkpoint)
    if quant_dict is None:
        return None
    tensors = _tensors_of_rows(checkpoint, headers_of_block(checkpoint, prefix), prefix, rows)
    return _quant_of_experts(quantized_layout(rows[0], prefix, quant_dict, num_experts, tensors))


def _tensors_of_rows(
    checkpoint: Checkpoint, headers: Headers, prefix: str, rows: Sequence[Layout]
) -> dict[str, TensorInfo]:
    return tensors_below(checkpoint, headers, {beginning for row in rows for beginning in beginnings_of(row, prefix)})


def _quant_of_experts(row: Layout) -> QuantConfig | None:
    return next((method.quant for path, method in row.methods if path == ("down",)), None)


def _quantized_rows(
    where: str,
    rows: Sequence[Layout],
    prefix: str,
    quant_dict: QuantDict,
    config: MoEConfig,
    tensors: Mapping[str, TensorInfo],
) -> tuple[Layout, ...]:
    """The rows with the tensors of the quantized checkpoint, without the rows that cannot be quantized like that.

    Raises ValueError if no row is left, or if the quantization differs from config.quant.
    """
    made, errors = list[Layout](), list[ValueError]()
    for row in rows:
        try:
            made.append(quantized_layout(row, prefix, quant_dict, config.num_experts, tensors))
        except ValueError as error:
            errors.append(error)
    if not made:
        raise ValueError(f"{where}: {errors[0]}")
    for row in made:
        found = _quant_of_experts(row)
        if _without_activations(found) != _without_activations(config.quant):
            raise ValueError(f"{where}: config.quant is {config.quant!r}; expected {found!r} as in quantization_config")
    return tuple(made)


def _without_activations(quant: QuantConfig | None) -> QuantConfig | None:
    """The scheme without the rounding of inputs, which the caller chooses."""
    return None if quant is None else dataclasses.replace(quant, activations=None)


def anchors_of(row: Layout) -> tuple[str, ...]:
    """The names that tensors of the down projection may have, quantized or not."""
    stem = row.anchor.removesuffix(".weight")
    return (
        row.anchor,
        *(
            stem + suffix
            for suffix in (FUSED_SUFFIXES if stem == row.anchor else CODES_SUFFIXES)
            if suffix != ".weight"
        ),
    )


def _rows_here(rows: Sequence[Layout], checkpoint: Checkpoint, prefix: str) -> tuple[Layout, ...]:
    """The rows whose down projection is in the checkpoint by name; all of the family's rows if none is."""
    for candidates in (rows, LAYOUTS):
        found = tuple(row for row in candidates if any(_is_there(checkpoint, prefix, name) for name in anchors_of(row)))
        if found:
            return found
    return tuple(rows)


def _is_there(checkpoint: Checkpoint, prefix: str, name: str) -> bool:
    return full_name(prefix, of_first_expert(name)) in checkpoint.file_of_tensor


def _only_fit(
    where: str, rows: Sequence[Layout], prefix: str, config: MoEConfig, tensors: Mapping[str, TensorInfo]
) -> Plan:
    found = [match(row, prefix, config, tensors) for row in rows]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    if not plans:
        failures = [
            (strangers(row, prefix, tensors), len(problems), place, problems)
            for place, (row, problems) in enumerate(zip(rows, found, strict=True))
            if isinstance(problems, list)
        ]
        *_, place, problems = min(failures)
        shown = "\n  ".join(problems[:_SHOWN]) + (
            f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        )
        raise ValueError(f"{where} does not fit the layout {rows[place].name!r} and the config:\n  {shown}")
    if any(plan.parts != plans[0].parts for plan in plans):
        names = ", ".join(repr(plan.layout.name) for plan in plans)
        raise ValueError(f"{where} fits the layouts {names}; expected one: choose it with layout=")
    return plans[0]
