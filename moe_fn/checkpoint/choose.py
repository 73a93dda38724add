"""Which row of the layout table a block is in: by model_type and by names, and by shapes where those do not tell."""

from collections.abc import Iterable, Mapping, Sequence

from moe_fn.checkpoint.entries import Layout
from moe_fn.checkpoint.files import TensorInfo
from moe_fn.checkpoint.folder import Checkpoint, Headers, model_types, read_headers, tensors_below
from moe_fn.checkpoint.layouts import LAYOUTS
from moe_fn.checkpoint.match import Plan, beginnings_of, full_name, match, quantised, strangers
from moe_fn.config import MoEConfig

_SHOWN = 8  # problems in one message


def layout_of_name(name: str) -> Layout:
    """The row of this name.

    >>> layout_of_name("mixtral").anchor
    'experts.{e}.w2.weight'
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"layout is {name!r}; expected one of {', '.join(repr(layout.name) for layout in LAYOUTS)}")


def layouts_of_family(types: Iterable[str]) -> tuple[Layout, ...]:
    """The rows of a model_type; all, if none of the types is known."""
    types = set(types)
    return tuple(layout for layout in LAYOUTS if types & set(layout.families)) or LAYOUTS


def headers_of_block(checkpoint: Checkpoint, prefix: str) -> Headers:
    """Headers of all files that hold a tensor of the block, in whatever layout."""
    beginnings = tuple({beginning for layout in LAYOUTS for beginning in beginnings_of(layout, prefix)})
    return read_headers(checkpoint, sorted({file for name, file in checkpoint.file_of_tensor.items() if name.startswith(beginnings)}))


def plan_of_block(checkpoint: Checkpoint, headers: Headers, prefix: str, config: MoEConfig, layout: Layout | str | None) -> Plan:
    """What to read for a block.

    Raises ValueError naming every tensor that is missing, surplus, mis-shaped or of a wrong dtype, with what was expected.
    """
    where = f"{checkpoint.folder}: {prefix}"
    if layout is None:
        rows = _rows_here(layouts_of_family(model_types(checkpoint.config)), checkpoint, prefix)
    else:
        rows = (layout_of_name(layout) if isinstance(layout, str) else layout,)
    tensors = tensors_below(checkpoint, headers, {beginning for row in rows for beginning in beginnings_of(row, prefix)})
    if not any(name.startswith(f"{prefix}.") for name in tensors):
        raise ValueError(f"{where} is not the beginning of any name; expected the tensors of a block below it")
    if names := quantised(prefix, LAYOUTS, tensors):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(f"{where}: quantised checkpoints are not supported yet; expected weights in F32, BF16, F16 or F64, got {shown}")
    return _only_fit(where, rows, prefix, config, tensors)


def _rows_here(rows: Sequence[Layout], checkpoint: Checkpoint, prefix: str) -> tuple[Layout, ...]:
    """Those rows whose last product is there under its name; the family's own, if there is none at all."""
    for candidates in (rows, LAYOUTS):
        found = tuple(row for row in candidates if full_name(prefix, _first(row.anchor)) in checkpoint.file_of_tensor)
        if found:
            return found
    return tuple(rows)


def _first(name: str) -> str:
    return name.replace("{e}", "0").replace("{second}", "0")


def _only_fit(where: str, rows: Sequence[Layout], prefix: str, config: MoEConfig, tensors: Mapping[str, TensorInfo]) -> Plan:
    found = [match(row, prefix, config, tensors) for row in rows]
    plans = [plan for plan in found if isinstance(plan, Plan)]
    if not plans:
        failures = [
            (strangers(row, prefix, tensors), len(problems), place, problems)
            for place, (row, problems) in enumerate(zip(rows, found, strict=True))
            if isinstance(problems, list)
        ]
        *_, place, problems = min(failures)
        shown = "\n  ".join(problems[:_SHOWN]) + (f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")
        raise ValueError(f"{where} does not fit the layout {rows[place].name!r} and the config:\n  {shown}")
    if any(plan.parts != plans[0].parts for plan in plans):
        names = ", ".join(repr(plan.layout.name) for plan in plans)
        raise ValueError(f"{where} fits the layouts {names}; expected one, say which by layout=")
    return plans[0]
