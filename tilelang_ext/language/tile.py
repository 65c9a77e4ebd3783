"""What an operand of an intrinsic is: the last dimensions of a buffer, or of a region whose leading indices are fixed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import arith, tirx

_SCOPES = {"local.fragment": "fragment", "shared.dyn": "shared", "": "global"}


@dataclass(frozen=True)
class Tile:
    """A buffer, its leading indices, which are fixed, and the first element and the extent of each axis of the tile."""

    intrinsic: str  # for messages
    name: str
    buffer: tirx.Buffer
    lead: tuple
    begin: tuple  # one int or expression per axis
    shape: tuple  # one int or expression per axis

    @property
    def dtype(self) -> str:
        return str(self.buffer.dtype)

    @property
    def scope(self) -> str:
        return _SCOPES.get(self.buffer.scope(), self.buffer.scope())

    def index(self, *at) -> tuple:
        """Return the buffer's indices of the element `at` of the tile."""
        return (*self.lead, *(first + i for first, i in zip(self.begin, at, strict=True)))

    def __getitem__(self, at) -> tirx.PrimExpr:
        return self.buffer[self.index(*at)]

    def moved(self, *by) -> Tile:
        """Return the tile that begins `by` elements further along each axis; it may reach past this one's end."""
        return replace(self, begin=tuple(first + i for first, i in zip(self.begin, by, strict=True)))

    def region(self, *axes) -> tirx.BufferRegion:
        """Return the region of `axes`, one (first, count) per axis, counted from the tile's first element."""
        starts = self.index(*(first for first, _ in axes))
        counts = [1] * len(self.lead) + [count for _, count in axes]
        return self.buffer[tuple(slice(at, at + count) for at, count in zip(starts, counts, strict=True))]

    def columns(self, first, count) -> tirx.BufferRegion | tirx.Buffer:
        """Return `count` columns of a matrix from `first` on, as an operand of T.copy or T.gemm; a whole buffer as itself."""
        rows, _ = self.shape
        if not self.lead and equal(count, self.buffer.shape[1]) and equal(rows, self.buffer.shape[0]):
            return self.buffer
        return self.region((0, rows), (first, count))

    def check_dtype(self, *allowed: str, hint: str) -> None:
        """Raise TypeError for a dtype that is not one of `allowed`."""
        if self.dtype not in allowed:
            raise TypeError(f"{self.intrinsic}: {self.name} must be {', '.join(allowed)}; got {self.dtype}; {hint}")

    def check_scope(self, *allowed: str, hint: str = "copy it with T.copy") -> None:
        """Raise TypeError for a scope that is not one of `allowed`."""
        if self.scope not in allowed:
            raise TypeError(
                f"{self.intrinsic}: {self.name} must be {', '.join(allowed)}; got {self.buffer.name} in scope {self.scope}; "
                f"{hint}"
            )

    def check_shape(self, *wanted, hint: str) -> None:
        """Raise ValueError unless every extent is provably the one wanted."""
        if not all(equal(got, want) for got, want in zip(self.shape, wanted, strict=True)):
            raise ValueError(f"{self.intrinsic}: {self.name} must have shape {_text(wanted)}; got {_text(self.shape)}; {hint}")

    def check_constant(self) -> None:
        """Raise ValueError for an extent that is not a number."""
        if not all(isinstance(extent, int) for extent in self.shape):
            raise ValueError(
                f"{self.intrinsic}: {self.name} must have constant extents; got {_text(self.shape)}; tile it, pass a region"
            )


def tile(intrinsic: str, name: str, operand, ndim: int = 2) -> Tile:
    """Read an operand as a tile of `ndim` dimensions."""
    try:
        region = to_buffer_region(operand)
    except (ValueError, AttributeError):
        raise TypeError(
            f"{intrinsic}: {name} must be a buffer or a region of one; got {type(operand).__name__}; pass a tile"
        ) from None
    axes = list(region.region)
    if len(axes) < ndim:
        raise ValueError(
            f"{intrinsic}: {name} must have at least {ndim} dimensions; got {len(axes)} ({region.buffer.name}); reshape it"
        )
    lead, own = axes[: len(axes) - ndim], axes[len(axes) - ndim :]
    if any(not equal(axis.extent, 1) for axis in lead):
        raise ValueError(
            f"{intrinsic}: leading dimensions of {name} must be fixed; got {region}; index them, as in {name}[stage, :, :]"
        )
    return Tile(
        intrinsic,
        name,
        region.buffer,
        tuple(axis.min for axis in lead),
        tuple(integer(axis.min) for axis in own),
        tuple(integer(axis.extent) for axis in own),
    )


def readable(source: Tile) -> Tile:
    """Return the tile, or a copy in shared memory of one in a fragment, whose elements only their own thread can read."""
    if source.scope != "fragment":
        return source
    staged = T.alloc_shared(source.shape, source.dtype)

    @T.macro
    def stage():
        T.copy(source.columns(0, source.shape[1]), staged)

    stage()
    return tile(source.intrinsic, source.name, staged)


def equal(first, second) -> bool:
    """Whether two extents are provably equal."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    return arith.Analyzer().can_prove_equal(tirx.convert(first), tirx.convert(second))


def differ(first, second) -> bool:
    """Whether two extents are provably different."""
    if isinstance(first, int) and isinstance(second, int):
        return first != second
    return arith.Analyzer().can_prove(tirx.convert(first) != tirx.convert(second))


def integer(extent) -> Any:
    """Return a constant extent as an int, and any other as it is."""
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else extent


def _text(shape) -> str:
    return f"({', '.join(map(str, shape))})"
