"""Mutants of the Triton kernels, one token of one line each. (Mutmut does not change decorated functions.)"""

import ast
import re
from collections.abc import Iterator

from tools import ROOT
from tools.mutants.made import Mutant, sampled

# (pattern, replacement): comparisons, sums, products, conditions, bounds and constants.
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
    (r" & ", " | "),
    (r"\bmin(imum)?\(", r"max\1("),
    (r"\bmax(imum)?\(", r"min\1("),
    (r"\bother=0\.0", "other=1.0"),
    (r"(?<![\w.\"'])(?<!arange\()([0-9]|16|32|64)(?![\w.\"'])", "NEXT"),
)
# Not mutated: comments, and lines that change no result (assertions, hints on pointers for the compiler). A range that
# starts at 1 is not a mutant, as its size must be a power of 2.
_NO_CODE = re.compile(r"^\s*(#|@|def |tl\.static_assert\(|.*tl\.(multiple_of|max_contiguous)\()")


def mutants_of_triton(file: str, count: int | None = None) -> list[Mutant]:
    """Returns every mutant of the kernels of a module, or a deterministic sample of `count`."""
    lines = (ROOT / file).read_text().splitlines(keepends=True)
    made = []
    for number in _code_lines(lines):
        line = lines[number]
        code = line.partition("  #")[0]
        for new in _changed(code):
            source = "".join((*lines[:number], new + line[len(code) :], *lines[number + 1 :]))
            made.append(Mutant(file, number + 1, f"{code.strip()} -> {new.strip()}", False, source))
    return made if count is None else sampled(file, made, count)


def _changed(code: str) -> Iterator[str]:
    for old, new in OPERATORS:
        for match in re.finditer(old, code):
            text = str(int(match[1]) + 1) if new == "NEXT" else match.expand(new)
            yield code[: match.start()] + text + code[match.end() :]


def _code_lines(lines: list[str]) -> list[int]:
    """Returns the indices of the lines of kernels, without signatures and docstrings."""
    functions = [
        node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.FunctionDef) and _is_kernel(node)
    ]
    bodies = [node.body[1:] if ast.get_docstring(node) else node.body for node in functions]
    chosen = {i for body in bodies for part in body for i in range(part.lineno - 1, part.end_lineno or part.lineno)}
    return [i for i in sorted(chosen) if not _NO_CODE.match(lines[i])]


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
