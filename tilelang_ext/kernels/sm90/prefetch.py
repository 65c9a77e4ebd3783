"""Prefetch of global memory into L2: a kernel that was launched early can ask for bytes that the kernel before may still write.

L2 is where all writes of the device meet, so nothing that is read later can be stale. A load into registers or shared memory
could be.
"""

from tilelang_ext import language as T

_SOURCE = """
__device__ __forceinline__ void tilelang_ext_prefetch_l2(const void *address, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}
__device__ __forceinline__ void tilelang_ext_prefetch_line_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
"""


def declare() -> None:
    """Declare the functions that `prefetch` and `prefetch_line` call; first thing in a kernel."""
    T.import_source(_SOURCE)


def prefetch(element, count: int) -> None:
    """Ask for `count` bytes, a multiple of 16, from an element on whose address is one too."""
    T.evaluate(T.call_extern("handle", "tilelang_ext_prefetch_l2", T.address_of(element), count))


def prefetch_line(element) -> None:
    """Ask for the line of 128 bytes that has an element, whatever its address."""
    T.evaluate(T.call_extern("handle", "tilelang_ext_prefetch_line_l2", T.address_of(element)))
