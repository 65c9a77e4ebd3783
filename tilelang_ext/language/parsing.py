"""The source of a kernel or macro is parsed once, however often the function that holds it is called.

`T.macro` and `T.prim_func` parse the source of a function, rewrite it and compile the result. A function that makes a kernel
for a configuration holds some ten macros, and each of its calls would parse all of them again, most of the time that making a
kernel takes. What comes out depends on the source, on the names of the variables that it takes from around it, and on what
upstream evaluates on the way, such as whether `T.Kernel` begins a kernel. Where these are the same, the compiled code meets
the variables of the new function.
"""

from __future__ import annotations

import ast
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

from tilelang.language.eager import ast as upstream
from tilelang.language.eager import builder

_lock = threading.Lock()
_seen: dict[tuple, _Parsed] = {}
_evaluating = threading.local()  # .seen: expressions that upstream evaluates while it parses a function, and what came out


@dataclass(frozen=True)
class _Parsed:
    """What upstream made of a source, without the variables of the function that it met first."""

    code: CodeType
    source: str
    type_hints: dict[str, Any]
    evaluated: tuple[tuple[str, Any], ...]


def parse_once() -> None:
    """Have upstream's decorators parse a source once; idempotent, and without effect where this upstream is another."""
    is_known = hasattr(builder, "mutate") and hasattr(upstream, "_try_eval") and hasattr(upstream, "utils")
    if is_known and not hasattr(builder.mutate, "__wrapped__"):
        builder.mutate = _remembering(builder.mutate)
        upstream._try_eval = _recording(upstream._try_eval)


def _remembering(mutate: Callable) -> Callable:
    @functools.wraps(mutate)
    def remembered(func: Callable) -> upstream.IRGenerator:
        variables = upstream.utils.get_func_nonlocals(func)
        key = func.__code__, func.__code__.co_filename, tuple(variables)
        found = _seen.get(key)
        if found is not None and all(_evaluate(text, variables, func) is value for text, value in found.evaluated):
            cells = tuple(CellType(variables[name]) for name in found.code.co_freevars)
            function = FunctionType(found.code, func.__globals__, found.code.co_name, None, cells)
            return upstream.IRGenerator(function, found.source, dict(found.type_hints))
        _evaluating.seen = []
        try:
            made = mutate(func)
            evaluated = tuple(_evaluating.seen)
        finally:
            _evaluating.seen = None
        with _lock:
            _seen[key] = _Parsed(made.gen.__code__, made.source, dict(made.extra_type_hints), evaluated)
        return made

    return remembered


def _recording(try_eval: Callable) -> Callable:
    @functools.wraps(try_eval)
    def recorded(node: ast.expr, variables: dict[str, Any], given: dict[str, Any]) -> Any:
        value = try_eval(node, variables, given)
        if getattr(_evaluating, "seen", None) is not None:
            _evaluating.seen.append((ast.unparse(node), value))
        return value

    return recorded


def _evaluate(text: str, variables: dict[str, Any], func: Callable) -> Any:
    return upstream._try_eval.__wrapped__(ast.parse(text, mode="eval").body, variables, func.__globals__)
