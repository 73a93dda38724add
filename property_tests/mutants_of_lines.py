"""Mutants of sources that mutmut does not change, C++ and Triton's kernels: one token of one line each."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mutants_made import ROOT, Mutant, sampled

# (what is replaced, by what): comparisons, sums, products, conditions, bounds and constants. Spaces keep templates, pointers and
# decorators of types out: the sources are formatted.
OPERATORS = (
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" \+= ", " -= "),
    (r" // | / ", " * "),
    (r" % ", " + "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" & ", " | "),
    (r" \? ", " ? !"),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"\bmin(imum)?\(", r"max\1("),
    (r"\bmax(imum)?\(", r"min\1("),
    (r"\bother=0\.0", "other=1.0"),
    (r"(?<![\w.\"'])([0-9]|16|32|64)(?![\w.\"'])", "NEXT"),
)
_NO_CODE = re.compile(r"^\s*(//|#|\*|/\*|template|static_assert|TORCH_CHECK|namespace|using|typedef|\"|import |from |@|def )")
_COMMENT = {".py": "  #", ".h": "//", ".cpp": "//"}


def mutants_of_lines(file: str, count: int | None = None) -> list[Mutant]:
    """Every mutant of a C++ source, or of the Triton kernels of a Python module; or so many of them, the same each time."""
    path = ROOT / file
    lines = path.read_text().splitlines(keepends=True)
    made = []
    for number in _code_lines(path, lines):
        line = lines[number]
        code = line.partition(_COMMENT[path.suffix])[0]
        for new in _changed(code):
            source = "".join((*lines[:number], new + line[len(code) :], *lines[number + 1 :]))
            made.append(Mutant(file, number + 1, f"{code.strip()} -> {new.strip()}", False, source))
    return made if count is None else sampled(file, made, count)


def _changed(code: str) -> Iterator[str]:
    for old, new in OPERATORS:
        for match in re.finditer(old, code):
            text = str(int(match[1]) + 1) if new == "NEXT" else match.expand(new)
            yield code[: match.start()] + text + code[match.end() :]


def _code_lines(path: Path, lines: list[str]) -> list[int]:
    """Indices of the lines that hold code to change."""
    if path.suffix == ".py":
        functions = [node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.FunctionDef) and _is_kernel(node)]
        bodies = [node.body[1:] if ast.get_docstring(node) else node.body for node in functions]
        chosen = {i for body in bodies for part in body for i in range(part.lineno - 1, part.end_lineno or part.lineno)}
    else:
        chosen = set(range(len(lines)))
    return [i for i in sorted(chosen) if not _NO_CODE.match(lines[i])]


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
