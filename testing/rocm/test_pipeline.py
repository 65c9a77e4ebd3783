"""Our pass list is upstream's, in its order, with passes of ours between."""

import inspect
import re

from tilelang.rocm.pipeline import ROCMPassPipelineBody

from tilelang_ext.rocm import pipeline


def passes(function) -> list[str]:
    return re.findall(r"transform\.([A-Z]\w+)", inspect.getsource(function))


def test_the_list_is_upstreams():
    materialize, *ours = passes(pipeline._materialize_kernel_launch) + passes(pipeline.lower)
    theirs = passes(ROCMPassPipelineBody)
    assert materialize in theirs
    elsewhere = {  # of `passes`: outside, hoisting, pipelines, known_layouts
        "LegalizeSafeMemoryAccess", "HoistIfThenElse", "PipelinePlanning", "InjectSoftwarePipeline", "LayoutInference",
    }  # fmt: skip
    assert ours == [name for name in theirs if name not in (materialize, *elsewhere)]
