"""Compile a prim_func for a target, once in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tilelang

from tilelang_ext import metal
from tilelang_ext.launch.device import Target


@functools.cache
def compiled(make: Callable, arguments: tuple, target: Target, pass_configs: tuple = ()) -> Callable:
    """Return make(*arguments), a prim_func, as a function of tensors on a device of `target`.

    `pass_configs` are pairs of a name and a value, as tilelang.compile takes them in a dict. All arguments are hashable, and
    equal ones share the compiled kernel.
    """
    prim_func = make(*arguments)
    if target.kind == "metal":
        return metal.to_torch(metal.lower(prim_func))
    return tilelang.compile(prim_func, target=target.tilelang, pass_configs=dict(pass_configs))
