"""What a row of the table is: a name of the language, a few lines that use it, what they compute, where they are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tilelang.language
from tvm.target import Target
from tvm.tirx import PrimFunc

from tilelang_ext import language, metal
from tilelang_ext.rocm import program as rocm

# A target by the name that the page's columns have, and the shorter names that stand for several of them in a row.
TARGETS = {
    "metal": "metal",
    "metal4": "metal4",
    "gfx942": "hip -mcpu=gfx942",
    "gfx950": "hip -mcpu=gfx950",
    "gfx1100": "hip -mcpu=gfx1100",
    "gfx1201": "hip -mcpu=gfx1201",
    "c": "c",
}
GROUPS = {
    "apple": ("metal", "metal4"),
    "hip": ("gfx942", "gfx950", "gfx1100", "gfx1201"),
    "gpu": ("metal", "metal4", "gfx942", "gfx950", "gfx1100", "gfx1201"),
    "all": tuple(TARGETS),
}


def public_names() -> set[str]:
    """Return every public name of the installed tilelang's language and of ours."""
    names = {name for module in (tilelang.language, language) for name in dir(module) if not name.startswith("_")}
    return names | set(tilelang.language.__all__)


def exists(name: str) -> bool:
    """Whether the installed tilelang has the name: the two versions have not the same ones."""
    return hasattr(tilelang.language, name) or hasattr(language, name)


@dataclass(frozen=True)
class Row:
    """A name, `emit` that uses it in a kernel, `want` that computes the same from the inputs, and the errors of targets.

    `refused` maps a target, or a group of them, to what the error's message must match.
    """

    name: str
    emit: Callable
    want: Callable | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def error(self, target: str) -> str | None:
        """Return what the error on `target` must match; None where the row is executed."""
        for name, pattern in self.refused.items():
            if target == name or target in GROUPS.get(name, ()):
                return pattern
        return None

    def is_executed(self, target: str) -> bool:
        """Whether the row's kernel runs on `target` and gives what `want` says."""
        return self.error(target) is None


class Recorder:
    """The language, and the names that were asked of it."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def __getattr__(self, name: str):
        self.used.add(name)
        return getattr(language if hasattr(language, name) else tilelang.language, name)


def lower(kernel: PrimFunc, target: str):
    """Return the program of a kernel on a target of the table; for `c` what tilelang returns."""
    if target == "c":
        with Target("c"):
            return tilelang.lower(kernel, target="c")
    return metal.lower(kernel, target) if target in GROUPS["apple"] else rocm.lower(kernel, TARGETS[target])
