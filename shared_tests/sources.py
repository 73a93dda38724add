"""Source text of Python as syntax trees."""

import ast


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Removes the docstrings of a tree in place, and returns it."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
            node.body = body[1:] or body  # type: ignore[attr-defined]
    return tree
