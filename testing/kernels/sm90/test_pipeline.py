"""Where a role is in a pipeline: a counted step and a `PipelineState` agree; by running CUDA text on the CPU."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from kernels.hopper import execute

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.pipeline import CONSUMER_START, PRODUCER_START, Pipeline, start_state

STEPS = 11


def walk(num_stages: int):
    """The prim_func: for each step, the stage and the phase of a state that starts with each phase, and the stage before."""

    @T.prim_func
    def walk(states: T.Tensor((STEPS, 2, 3), "int32")):
        with T.Kernel(1, threads=32):
            consumer = start_state(num_stages, CONSUMER_START)
            producer = start_state(num_stages, PRODUCER_START)
            for step in T.serial(STEPS):
                states[step, 0, 0], states[step, 0, 1] = consumer.stage, consumer.phase
                states[step, 1, 0], states[step, 1, 1] = producer.stage, producer.phase
                states[step, 0, 2], states[step, 1, 2] = consumer.previous_stage, producer.previous_stage
                consumer.advance()
                producer.advance()

    return walk


@needs_compiler
@pytest.mark.parametrize("num_stages", [1, 3, 4])
def test_states(num_stages):
    states = torch.full((STEPS, 2, 3), -1, dtype=torch.int32)
    execute(lower(walk(num_stages), "sm_90a"), (1, 1), {"states": states}, {}, {})
    counted = Pipeline(num_stages, full=None, empty=None)
    for step in range(STEPS):
        stage, before = counted.stage(step), counted.stage(step - 1)
        assert states[step].tolist() == [
            [stage, counted.full_phase(step), before],
            [stage, counted.empty_phase(step), before],
        ]
