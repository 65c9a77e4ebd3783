"""A pipeline of stages in shared memory between a producer and its consumers, ordered by two mbarriers per stage.

| barrier | arrivals that complete a phase | who waits for it |
| --- | --- | --- |
| full[stage] | every producer thread, and the bytes of the TMA loads that name the barrier | every consumer thread |
| empty[stage] | one lane of every consumer warp that reads the stage | every producer thread |

    producer                                            consumer
    acquire(stage, phase)                               wait(stage, phase)
    T.tma_copy(..., barrier=pipeline.full[stage])       MMAs that read the stage
    commit(stage)                                       release(stage, lane)

A phase is the parity bit of the mbarrier's phase that is waited for. Consumers begin with phase 0. Producers begin with 1,
the phase before the first one, which counts as complete: the first round of `acquire` returns at once. Where a stage is
comes from a count of steps (`stage`, `full_phase`, `empty_phase`), or from a `PipelineState`.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.roles import WARP

PRODUCER_START, CONSUMER_START = 1, 0  # phases


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The barriers of `num_stages` stages; the buffers of the stages belong to the kernel."""

    num_stages: int
    full: Any  # barriers (num_stages,)
    empty: Any
    cluster: int = 1  # blocks whose producers write each other's stages

    def stage(self, step):
        """Return the stage of a step; a remainder is cheap if `num_stages` is a power of two."""
        return step % self.num_stages

    def full_phase(self, step):
        """Return the phase that a consumer waits for in a step."""
        return (step // self.num_stages) & 1

    def empty_phase(self, step):
        """Return the phase that the producer waits for in a step."""
        return self.full_phase(step) ^ 1

    def acquire(self, stage, phase) -> None:
        """Producer: wait until the consumers have released the stage."""
        T.evaluate(T.barrier_wait(self.empty[stage], phase))

    def commit(self, stage) -> None:
        """Producer: arrive after issuing the loads of a stage. Every producer thread calls it."""
        T.evaluate(T.barrier_arrive(self.full[stage]))

    def commit_warp(self, stage, lane) -> None:
        """Producer: `commit` of a pipeline with one arrival of each producer warp, whose lanes have written to the stage."""
        full = self.full

        @T.macro
        def emit():
            T.sync_warp()
            if lane == 0:
                T.barrier_arrive(full[stage])

        emit()

    def commit_copies(self, stage) -> None:
        """Producer: `commit` that counts once the thread's asynchronous copies, `T.ptx_cp_async`, are done."""
        T.evaluate(T.cp_async_barrier_noinc(self.full[stage]))

    def commit_once(self, stage) -> None:
        """Producer: `commit` of a pipeline with one arrival of the producer, by the thread that issued the loads.

        Arrivals of a warp at one barrier take turns: those of a whole warpgroup take longer than a small stage. The producer is
        one warp, whose lanes meet behind `acquire`: nobody waits for other threads, which could be late and miss a phase.
        """
        full = self.full

        @T.macro
        def emit():
            if T.shuffle_elect(WARP):
                T.mbarrier_arrive(full[stage])

        emit()

    def wait(self, stage, phase) -> None:
        """Consumer: wait until the loads of a stage have landed."""
        T.evaluate(T.barrier_wait(self.full[stage], phase))

    def release(self, stage, lane) -> None:
        """Consumer: hand the stage back, one arrival per warp, once its last MMA that reads the stage is complete.

        In a cluster, the stage is handed to the producers of all its blocks.
        """
        if self.cluster == 1:
            arrive_once(self.empty, stage, lane)
        else:
            arrive_in_cluster(self.empty, stage, lane, self.cluster)


def alloc_pipeline(num_stages: int, producer_arrivals: int, consumer_arrivals: int, cluster: int = 1) -> Pipeline:
    """Allocate the barriers: arrivals are producer threads, and consumer warps of a block that read a stage.

    With a `cluster` of several blocks, a producer writes the same stage of all of them.
    """

    @T.macro
    def alloc():
        full = T.alloc_barrier([producer_arrivals] * num_stages)
        empty = T.alloc_barrier([consumer_arrivals] * num_stages)
        return full, empty

    @T.macro
    def alloc_in_cluster():
        full = T.alloc_barrier([producer_arrivals] * num_stages)
        empty = T.alloc_cluster_barrier([consumer_arrivals * cluster] * num_stages)
        return full, empty

    return Pipeline(num_stages, *(alloc() if cluster == 1 else alloc_in_cluster()), cluster)


@T.macro
def arrive_once(barriers, index, lane):
    """Arrive at barriers[index], once per warp."""
    if lane == 0:
        T.mbarrier_arrive(barriers[index])


@T.macro
def arrive_in_cluster(barriers, index, lane, blocks):
    """Arrive at barriers[index] of every block of the cluster, once per warp: one lane for each block."""
    if lane < blocks:
        T.mbarrier_arrive(barriers[index], lane)


@dataclass(frozen=True, eq=False)
class PipelineState:
    """The stage and the phase of one role, in two registers: for numbers of stages that are no powers of two."""

    num_stages: int
    registers: Any  # int32 (2,)

    @property
    def stage(self):
        return self.registers[0]

    @property
    def phase(self):
        return self.registers[1]

    @property
    def previous_stage(self):
        """The stage before this one, for a consumer that releases a stage one step late."""
        return T.if_then_else(self.registers[0] == 0, self.num_stages, self.registers[0]) - 1

    def advance(self) -> None:
        """Go on to the next stage; the phase flips when the stages begin again."""
        registers, num_stages = self.registers, self.num_stages

        @T.macro
        def emit():
            registers[0] = registers[0] + 1
            if registers[0] == num_stages:
                registers[0] = 0
                registers[1] = registers[1] ^ 1

        emit()


def start_state(num_stages: int, phase: int) -> PipelineState:
    """Allocate the state of a role at stage 0: `phase` is PRODUCER_START or CONSUMER_START."""

    @T.macro
    def alloc():
        state = T.alloc_local((2,), "int32")
        state[0], state[1] = 0, phase
        return state

    return PipelineState(num_stages, alloc())
