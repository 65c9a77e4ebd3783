"""Warp specialization: which threads of a block are producers and which are consumers, and how they share the registers."""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T

WARP = 32  # threads
WARPGROUP = 128  # threads


@dataclass(frozen=True)
class Roles:
    """One producer warpgroup that issues TMA loads, and `num_consumers` warpgroups that issue MMAs.

    The registers are of one thread. With two consumers, 128 x 40 + 256 x 232 are all but 1024 of the SM's 65,536.
    """

    num_consumers: int = 2
    producer_registers: int = 40
    consumer_registers: int = 232

    @property
    def consumer_threads(self) -> int:
        """Threads of all consumer warpgroups."""
        return self.num_consumers * WARPGROUP

    @property
    def consumer_warps(self) -> int:
        """Warps of all consumer warpgroups, each of which releases a stage by one arrival."""
        return self.consumer_threads // WARP

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPGROUP + self.consumer_threads

    def begin_producer(self) -> None:
        """Give up the registers that a producer does not need; every warp of the warpgroup must get here."""
        T.evaluate(T.dec_max_nreg(self.producer_registers))

    def begin_consumer(self) -> None:
        """Take the registers that the producer gave up; every warp of the warpgroup must get here."""
        T.evaluate(T.inc_max_nreg(self.consumer_registers))


def dispatch(thread, *roles: tuple[int, Callable[[], object]]) -> None:
    """Send each thread of a block to its role: `roles` are pairs (threads, emit), the first threads take the first role.

    `emit()` emits the code of a role. The last role also takes all threads that remain.
    """
    _dispatch(thread, 0, roles)


def _dispatch(thread, first: int, roles) -> None:
    (threads, emit), *others = roles

    @T.macro
    def choose():
        if thread < first + threads:
            emit()
        else:
            _dispatch(thread, first + threads, others)

    if others:
        choose()
    else:
        emit()


def warpgroup_sync(warpgroup: int) -> None:
    """Wait for the other threads of consumer `warpgroup`, a Python number, at a named barrier of its own.

    A barrier whose number is no constant would make the compiler reserve all sixteen of the block.
    """
    T.evaluate(T.sync_threads(barrier_id=1 + warpgroup, arrive_count=WARPGROUP))
