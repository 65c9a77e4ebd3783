"""Products of tokens and MXFP4 weights in global memory, and calls of the functions that compute them on Hopper."""

from __future__ import annotations

from typing import NamedTuple

from tilelang import language as T
from tvm import tirx

from tilelang_ext.cuda.statements import call, equal, is_global, parallel, sequence, store, strides_of
from tilelang_ext.cuda.warp_roles import OtherForm
from tilelang_ext.formats import MX_GROUP

_NAMESPACE = "tilelang_ext"
_ALIGNMENT = 16  # bytes


class Product(NamedTuple):
    """total[i, j] = sum over k of A[i, k] * (scale W)[j, k]; regions of all K in global memory."""

    total: tirx.Buffer
    A: tirx.BufferRegion
    W: tirx.BufferRegion
    scale: tirx.BufferRegion
    K: tirx.PrimExpr
    added_to: tirx.Buffer | None = None  # what a loop adds to; `total` is then a buffer of our own
    ids: tirx.BufferRegion | None = None  # A[i] is then the row of A whose number is in the lower bits of ids[i], or zeros

    @property
    def M(self) -> int:
        return int(self.total.shape[0])

    @property
    def N(self) -> int:
        return int(self.total.shape[1])

    def scales(self) -> tuple:
        """Return the first scale, bytes from row to row, and the rows of weights that are left."""
        return first_of(self.scale), stride_of(self.scale), rows_of(self.scale)

    def completed(self, statement: tirx.Stmt) -> tirx.Stmt:
        """Return the statement that computes `total`, and behind it the addition of `total`, if there is one."""
        C = self.added_to
        if C is None:
            return statement
        return sequence(statement, parallel(C.shape, lambda i, j: store(C, C[i, j] + self.total[i, j], i, j)))


def checked(product: Product, groups: int) -> Product:
    """Return a product whose operands the functions can read, which take `groups` of 32 of K at once; raises OtherForm."""
    A, W, scale, K = product.A, product.W, product.scale, product.K
    for region in (A, W, scale, *([] if product.ids is None else [product.ids])):
        if not is_global(region.buffer):
            raise OtherForm(f"{region.buffer.name} is in scope {region.buffer.scope()}")
    if not is_multiple(K, groups * MX_GROUP):
        raise OtherForm(f"K is {K}, which may be no multiple of {groups * MX_GROUP}")
    for region, alignment in ((A, _ALIGNMENT), (W, _ALIGNMENT), (scale, groups)):
        if not begins_at(region, alignment):
            raise OtherForm(f"rows of {region.buffer.name} do not begin at multiples of {alignment} bytes")
    return product


def begins_at(region: tirx.BufferRegion, alignment: int) -> bool:
    """Whether the rows of a region lie side by side in multiples of some bytes, from which the buffer begins."""
    size, strides = region.buffer.dtype.bits // 8, strides_of(region.buffer)
    places = (*strides[:-1], region.region[-1].min)
    return equal(strides[-1], 1) and all(is_multiple(place * size, alignment) for place in places)


def is_multiple(value, of: int) -> bool:
    return equal(tirx.convert(value) % of, 0)


def first_of(region: tirx.BufferRegion):
    """Return the address of a region's first element."""
    # Not T.address_of: StorageRewrite takes a factor of its index for a number of lanes, of which there are at most 32767.
    return T.access_ptr(region.buffer[tuple(axis.min for axis in region.region)], "r")


def stride_of(region: tirx.BufferRegion):
    """Return the bytes from one row to the next."""
    return T.cast(strides_of(region.buffer)[-2] * (region.buffer.dtype.bits // 8), "int64")


def rows_of(region: tirx.BufferRegion):
    """Return how many rows there are from the region's first on."""
    return region.buffer.shape[-2] - region.region[-2].min


def device_call(function: str, *arguments) -> tirx.Stmt:
    return call(T.call_extern("handle", f"{_NAMESPACE}::{function}", *arguments))
