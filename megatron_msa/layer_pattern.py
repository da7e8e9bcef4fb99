"""Per-layer 0/1 patterns in the notation of Megatron's `--moe-layer-freq`."""

from __future__ import annotations

import ast

from megatron_msa.errors import ConfigError


def parse_layer_pattern(value: int | str | list[int], num_layers: int, flag: str) -> list[int]:
    """Expand a layer pattern to one entry per layer.

    Args:
        value: an integer N (a 1 in every N-th layer, starting with the first), or a list expression such as
            ``([0]*3+[1]*38)``, or the list itself.
        num_layers: length of the result.
        flag: the command-line flag, for messages.

    Returns:
        ``num_layers`` integers, each 0 or 1.

    Raises:
        ConfigError: not an integer or list expression, wrong length, or entries other than 0 and 1.
    """
    if isinstance(value, str):
        value = _evaluate(value, flag)
    if isinstance(value, int):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; an integer frequency must be at least 1")
        return [1 if layer % value == 0 else 0 for layer in range(num_layers)]
    if len(value) != num_layers:
        raise ConfigError(
            f"{flag} describes {len(value)} layers, the model has {num_layers} (--num-layers); "
            "write one 0 or 1 per layer, for example ([0]*3+[1]*38) for 41 layers"
        )
    if any(entry not in (0, 1) for entry in value):
        raise ConfigError(f"{flag} may hold only 0 and 1, got {sorted(set(value))}")
    return list(value)


def _evaluate(text: str, flag: str) -> int | list[int]:
    """Evaluate an expression of integers, lists, ``+`` and ``*``; nothing else is accepted."""

    def visit(node: ast.expr) -> int | list[int]:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.List):
            items = [visit(element) for element in node.elts]
            if all(isinstance(item, int) for item in items):
                return items  # type: ignore[return-value]
        if isinstance(node, ast.BinOp):
            left, right = visit(node.left), visit(node.right)
            if isinstance(node.op, ast.Mult) and isinstance(left, int) != isinstance(right, int):
                return left * right  # type: ignore[operator]
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
        raise ValueError

    try:
        return visit(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"{flag} is {text!r}; expected an integer N (every N-th layer) or a list expression such as "
            "([0]*3+[1]*38)"
        ) from None
