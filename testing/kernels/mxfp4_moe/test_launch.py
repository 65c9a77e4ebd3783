"""The launches of `mxfp4_moe`: what they keep between calls, and how many blocks they have."""

import pytest
import torch
from kernels.mxfp4_moe.operands import SWIGLU, TOP_K, arguments
from torch.utils._python_dispatch import TorchDispatchMode

from tilelang_ext.kernels.mxfp4_moe import launch


def test_mask_of_every_expert_is_made_once(monkeypatch):
    """A graph's own mask lives in the graph's memory: it is not kept, while one that is kept serves graphs too."""

    class Ones:
        def to(self, device):
            return self

    capturing, device = False, torch.device("cuda", 0)
    monkeypatch.setattr(launch, "_MASKS", {})
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device=None: Ones())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    capturing = True
    of_graph = launch._every_expert(8, device)
    assert isinstance(of_graph, Ones)
    capturing = False
    kept = launch._every_expert(8, device)
    assert kept is not of_graph
    assert launch._every_expert(8, device) is kept
    assert launch._every_expert(9, device) is not kept
    cpu = torch.device("cpu")
    assert launch._every_expert(8, cpu) is not launch._every_expert(8, cpu)
    capturing = True
    assert launch._every_expert(8, device) is kept


def test_mask_of_every_expert():
    mask = launch._every_expert(5, torch.device("cpu"))
    assert torch.equal(mask, torch.ones(5, dtype=torch.int32))
    assert mask.dtype == torch.int32


@pytest.mark.parametrize(("tokens", "most"), [(1, TOP_K), (5, 5 * TOP_K + 1)])
def test_few_tokens_have_few_blocks(tokens, most):
    """However many experts there are."""
    (x, topk_ids, topk_weights, *weights), _ = arguments()
    mask = torch.arange(64) < 4
    launched = {}

    def record(make, options, device):
        return lambda *tensors: launched.update({make.__name__: tensors})

    tensors = x[:tokens], topk_ids[:tokens], topk_weights[:tokens], *weights
    launch.launch(*tensors, SWIGLU, "bfloat16", "reduce", mask, torch.empty_like(x[:tokens]), compiled=record)
    expert_ids = launched["moe_sort"][6]
    assert tokens * TOP_K <= len(expert_ids) <= most
    assert expert_ids is launched["gate_up"][2]


def test_ids_that_are_not_distinct_stay_inside():
    """More slots of a token than experts: one slot for the second expert, all others for the first."""
    (x, _, _, *weights), _ = arguments()
    two = [w._replace(codes=w.codes[:2], scale=w.scale[:2], bias=w.bias[:2]) for w in weights]
    topk_ids, launched = torch.zeros(1, 127, dtype=torch.int32), {}
    topk_ids[0, 5] = 1

    def record(make, options, device):
        return lambda *tensors: launched.update({make.__name__: tensors})

    launch.launch(
        x[:1], topk_ids, torch.ones(1, 127), *two, SWIGLU, "bfloat16", "reduce", None, torch.empty_like(x[:1]), compiled=record
    )
    token_ids, _, expert_ids = launched["moe_sort"][4:7]
    block_m = len(token_ids) // len(expert_ids)
    assert len(expert_ids) >= -(-126 // block_m) + 1


def test_x_is_copied_before_the_sort():
    """Rows are put in order by a launch that reads x before the one before it has ended."""
    (x, *rest), _ = arguments()
    columns, events = x.t().contiguous().t(), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            events.extend(["copy"] if function is torch.ops.aten.clone.default else [])
            return function(*args, **(kwargs or {}))

    def record(make, options, device):
        return lambda *tensors: events.append(make.__name__)

    with Record():
        launch.launch(columns, *rest, SWIGLU, "bfloat16", "reduce", None, torch.empty_like(x), compiled=record)
    assert events == ["copy", "moe_sort", "gate_up", "down", "sum_slots"]


def test_old_tilelang_on_nvidia(monkeypatch):
    """An error of ours, not one of nvcc."""
    monkeypatch.setattr(launch.tilelang, "__version__", "0.1.14")
    monkeypatch.setattr(torch.version, "hip", None)
    launch._check_tilelang(torch.device("cpu"))
    with pytest.raises(
        NotImplementedError, match=r"these weights need tilelang 0\.1\.15 on NVIDIA GPUs; got 0\.1\.14; upgrade"
    ):
        launch._check_tilelang(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch._check_tilelang(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch.tilelang, "__version__", "0.1.15")
    launch._check_tilelang(torch.device("cuda"))
