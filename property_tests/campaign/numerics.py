"""The numerics page: errors against float64, each with its error bound from theory."""

from collections.abc import Sequence
from typing import Any

from campaign.checking import Line
from campaign.coverage import AXES
from campaign.drawing import DTYPES
from campaign.measuring import Measured
from campaign.summary import Summary, by, number, summary_of, table

_THEORY = """\
## Where the bound comes from

Every number of the layer is computed twice: once in float64, and once as the farthest that rounding may take it
("running error analysis": Wilkinson; Higham, *Accuracy and Stability of Numerical Algorithms*, chapters 2 and 3). With
unit roundoff `u` of the layer's dtype, `v` of float32 (of float64 for float64 layers), `r_a` the bound of a number `a`
so far, and `gamma_n = n v / (1 - n v)`:

| step of the layer | what it adds to the bound |
| --- | --- |
| a product `W x` with `n` inputs, summed in float32 in any order | `abs(W) r_x + gamma_(n+1) abs(W) (abs(x) + r_x)` |
| storing a number in the layer's dtype | `u (abs(a) + r_a)`, and half the least number |
| a sum or product of two numbers in float32 | `v` of the result; for `a b` also `abs(a) r_b + abs(b) r_a + r_a r_b` |
| an activation `f` | the larger of `abs(f(g + r) - f(g))`, `abs(f(g - r) - f(g))`, plus `r^2` for turning points, plus `10 v abs(g)` |
| softmax of `n` logits | a factor of `exp(2 r_z)`, and `(n + 8 + 2 abs(z - max)) v` of the score |
| renormalising | `(r_w + w r_D) / (D - r_D)`, where `D` moves by no more than the sum of the `r_w` |
| the sum over `k` experts | `sum abs(w) r_o + abs(o) r_w`, and `gamma_(k-1) sum abs(w o)`, stored once |
| a root-mean-square norm | of the mean square `m`, the ends of `1 / sqrt(m + epsilon)` over `[m - r_m, m + r_m]` |
| weights that are codes | `u + 4 v` of each number, and of zero point times scale |
| inputs that are rounded to codes | all codes that `[x - r, x + r]` rounds to, times all scales that the largest input can have |
| a sum over `n` ranks | `n + 1` roundings more, in the layer's dtype, of `abs(W) abs(x)` |

No step is fitted to measurements. The bound is of one problem: it is large where terms cancel, and where a number is
on a tie between two codes it includes both codes, so no tolerance is needed for ties. `moe_fn.testing.error_bound`
computes it for any problem, yours too. An error is at most its bound ("of bound" <= 1) and usually much smaller:
errors of n terms grow like sqrt(n), bounds like n. In bfloat16 and float16 the last rounding alone can come near the
bound.
"""  # noqa: E501


def numerics(lines: Sequence[Line], about: dict[str, Any], measured: Sequence[Measured] = ()) -> str:
    """Returns the page, from a campaign's lines and the measurements of `measuring` and `ranks`."""
    last = about["runs"][-1]
    head = (
        "# Numerics\n\n"
        "Relative RMS error of the layer's output against the float64 reference, and its theoretical bound. "
        f"{len(lines)} random problems "
        f"of seed {about['seed']} ({last['date'][:10]}, torch {last['versions']['torch']}, {last['cpu']}), widths 1 to "
        "40; then the "
        "widths of models, and ranks. Made by `PYTHONPATH=property_tests python -m campaign report`.\n\n"
        "`median` and `worst` are errors, `bound` is the median of the bounds, `of bound` the largest share of its "
        "bound that any entry of "
        "any output used: at most 1. Errors are relative to the output, so they are large where its terms cancel; "
        "the bound is too.\n"
    )
    parts = [
        head,
        _THEORY,
        _dtypes(lines),
        _by("Activations", "activation", lines),
        _codes(lines),
        *_measured(measured),
    ]
    return "\n".join(parts)


def _cells(summary: Summary) -> list[str]:
    return [number(summary.median), number(summary.worst), number(summary.median_bound), number(summary.share)]


def _dtypes(lines: Sequence[Line]) -> str:
    groups = by([line for line in lines if line.features["inputs"] == "None"], lambda line: line.features["dtype"])
    rows = [[dtype, str(len(groups[dtype])), *_cells(summary_of(groups[dtype]))] for dtype in DTYPES if dtype in groups]
    return "## Dtypes (inputs not rounded to codes)\n\n" + table(
        ["dtype", "problems", "median", "worst", "bound", "of bound"], rows
    )


def _by(title: str, option: str, lines: Sequence[Line]) -> str:
    plain = by([line for line in lines if line.features["inputs"] == "None"], lambda line: line.features["dtype"])
    rows = []
    for value in AXES[option]:
        for dtype in DTYPES:
            group = [line for line in plain.get(dtype, []) if line.features[option] == value]
            rows += [[value, dtype, str(len(group)), *_cells(summary_of(group))]] if group else []
    head = [option, "dtype", "problems", "median", "worst", "bound", "of bound"]
    return f"## {title}\n\n" + table(head, rows)


def _codes(lines: Sequence[Line]) -> str:
    """Returns the table by scheme and by rounding of inputs; problems with an undecided code are counted separately."""
    groups = by(lines, lambda line: "/".join(line.features[name] for name in ("quant", "inputs", "dtype")))
    rows = []
    for quant in AXES["quant"][1:]:
        for inputs in AXES["inputs"]:
            for dtype in DTYPES:
                group = groups.get(f"{quant}/{inputs}/{dtype}")
                if group:
                    summary = summary_of(group)
                    tied = [str(summary.tied), number(summary.worst_tied)]
                    rows.append([quant, inputs, dtype, str(len(group)), *_cells(summary), *tied])
    head = [
        "codes",
        "inputs rounded to",
        "dtype",
        "problems",
        "median",
        "worst",
        "bound",
        "of bound",
        "with ties",
        "worst of these",
    ]
    return (
        "## Codes\n\nAgainst the float64 layer with the same codes: the error of quantizing the original floats "
        "is not included. "
        "`with ties`: problems where rounding errors decide between two codes of an input; "
        "they are left out of `median`, `worst` and "
        "`bound`, not of `of bound`.\n\n" + table(head, rows)
    )


def _measured(measured: Sequence[Measured]) -> list[str]:
    """Returns one table for each kind of measurement."""
    pages = []
    for title, kind in (
        ("Widths of models (4 experts, top 2, intermediate size half the width, 8 tokens in all)", "width"),
        ("Activations at width 256", "activation"),
        ("Codes at width 256", "codes"),
        ("Formats over ranks (width 64, processes on one machine; of every rank's tokens)", "ranks"),
    ):
        rows = [
            [
                row.what.removeprefix(kind).strip(),
                row.dtype,
                *(number(n) for n in (row.median, row.worst, row.bound, row.share)),
            ]
            for row in measured
            if row.what.startswith(kind + " ")
        ]
        pages += (
            [f"## {title}\n\n" + table([kind, "dtype", "median", "worst", "bound", "of bound"], rows)] if rows else []
        )
    return pages
