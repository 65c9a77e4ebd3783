"""`T.copy` and the atomics of upstream, which refuse tiles of unlike shapes by an error of the style's rule.

Upstream compares two whole buffers by StructuralEqual, whose error prints two shapes, takes an element to be the first of a
tile by an assertion without words, and otherwise lets the tiles meet in the compiler (`passes/region_shapes.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import tilelang.language as upstream
from tilelang.language.utils import get_extent
from tvm import tirx

from tilelang_ext.language.tile import equal


def _checked(name: str, source_at: int) -> Callable:
    """Return upstream's function `name`, which takes source and destination first, with source as argument `source_at`."""
    function = getattr(upstream, name)

    # Versions of tilelang differ in the arguments that follow.
    @functools.wraps(function)
    def checked(first, second, *arguments, **options):
        source, destination = (first, second) if source_at == 0 else (second, first)
        _check(name, source, destination)
        return function(first, second, *arguments, **options)

    return checked


def _check(name: str, source, destination) -> None:
    got, wanted = get_extent(source), get_extent(destination)
    whole = isinstance(source, tirx.Buffer) and isinstance(destination, tirx.Buffer)
    if got is None or wanted is None:
        element, tile = (source, wanted) if got is None else (destination, got)
        # An element is the first of a tile as large as the other one, if it has as many indices.
        unlike = isinstance(element, tirx.BufferLoad) and tile is not None and len(element.indices) < len(_axes(tile))
    elif whole:
        unlike = len(got) != len(wanted) or not all(equal(a, b) for a, b in zip(got, wanted, strict=True))
    else:
        unlike = len(_axes(got)) != len(_axes(wanted))
    if unlike:
        raise ValueError(
            f"T.{name}: both tiles must have the same extents, but for axes of 1; got {_text(source, got)} for "
            f"{_text(destination, wanted)}; index or slice the larger one, or take a T.Parallel over its elements"
        )


def _axes(extents) -> list:
    return [extent for extent in extents if not equal(extent, 1)]


def _text(operand, extents) -> str:
    buffer = getattr(operand, "buffer", operand)
    if extents is None:
        return f"an element of {buffer.name} ({', '.join(map(str, buffer.shape))})"
    return f"{buffer.name} ({', '.join(map(str, extents))})"


copy = _checked("copy", 0)
atomic_add, atomic_max, atomic_min = (_checked(name, 1) for name in ("atomic_add", "atomic_max", "atomic_min"))
