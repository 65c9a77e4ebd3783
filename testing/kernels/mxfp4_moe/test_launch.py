"""The launches of `mxfp4_moe`: which implementation they choose, what they keep between calls, how many blocks they have."""

import dataclasses

import pytest
import torch
from kernels.mxfp4_moe.operands import SWIGLU, TOP_K, arguments, launch_kernels, problem
from torch.utils._python_dispatch import TorchDispatchMode

from tilelang_ext.kernels.mxfp4_moe import launch, sm90_mma, sm90_wgmma, tiled
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, HOPPER_LAYOUTS


@pytest.mark.parametrize(
    ("layout", "tokens", "expected"),
    [
        (GENERAL_LAYOUT, 1, tiled),
        (GENERAL_LAYOUT, 4096, tiled),
        (HOPPER_LAYOUTS["bfloat16"], 48, sm90_mma),  # 6 rows per expert
        (HOPPER_LAYOUTS["bfloat16"], 49, sm90_wgmma),
        (HOPPER_LAYOUTS["fp8"], 1, sm90_wgmma),
    ],
)
def test_implementation(layout, tokens, expected):
    """The first that takes the problem; an MMA of one warp only for few rows per expert, and never for fp8."""
    a_format = next((name for name, hopper in HOPPER_LAYOUTS.items() if hopper == layout), "mxfp4")
    case = problem(tokens, 4, 32, weights_layout=layout, a_format=a_format)
    assert next(file for file in launch.IMPLEMENTATIONS if file.takes(case)) is expected


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

    def record(make, options, device, pass_configs):
        return lambda *tensors: launched.update({make.__name__: tensors})

    tensors = x[:tokens], topk_ids[:tokens], topk_weights[:tokens], *weights
    launch_kernels(tensors, torch.empty_like(x[:tokens]), mask=mask, compiled=record)
    expert_ids = launched["moe_sort"][6]
    assert tokens * TOP_K <= len(expert_ids) <= most
    assert expert_ids is launched["gate_up"][2]


def test_ids_that_are_not_distinct_stay_inside():
    """A token has more slots than there are experts: one slot for the second expert, all others for the first."""
    (x, _, _, *weights), _ = arguments()
    two = [w._replace(codes=w.codes[:2], scale=w.scale[:2], bias=w.bias[:2]) for w in weights]
    topk_ids, launched = torch.zeros(1, 127, dtype=torch.int32), {}
    topk_ids[0, 5] = 1

    def record(make, options, device, pass_configs):
        return lambda *tensors: launched.update({make.__name__: tensors})

    launch_kernels((x[:1], topk_ids, torch.ones(1, 127), *two), torch.empty_like(x[:1]), compiled=record)
    token_ids, _, expert_ids = launched["moe_sort"][4:7]
    block_M = len(token_ids) // len(expert_ids)
    assert len(expert_ids) >= -(-126 // block_M) + 1


def test_x_is_copied_before_the_sort():
    """The kernel that puts rows in order reads x before the kernel before it has ended."""
    (x, *rest), _ = arguments()
    columns, events = x.t().contiguous().t(), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            events.extend(["copy"] if function is torch.ops.aten.clone.default else [])
            return function(*args, **(kwargs or {}))

    def record(make, options, device, pass_configs):
        return lambda *tensors: events.append(make.__name__)

    with Record():
        launch_kernels((columns, *rest), torch.empty_like(x), compiled=record)
    assert events == ["copy", "moe_sort", "gate_up", "down", "sum_slots"]


def test_old_tilelang_on_nvidia(monkeypatch):
    """The error is ours, not one of nvcc."""
    monkeypatch.setattr(launch.tilelang, "__version__", "0.1.14")
    with pytest.raises(
        NotImplementedError, match=r"these weights need tilelang 0\.1\.15 on NVIDIA GPUs; got 0\.1\.14; upgrade"
    ):
        launch._check_tilelang(problem(1, 4, 32))
    launch._check_tilelang(problem(1, 4, 32, weights_layout=HOPPER_LAYOUTS["bfloat16"]))
    for target_kind in ("hip", "metal", "c"):
        launch._check_tilelang(problem(1, 4, 32, target_kind=target_kind))
    monkeypatch.setattr(launch.tilelang, "__version__", "0.1.15")
    launch._check_tilelang(problem(1, 4, 32))


def test_problem_of_a_call():
    (x, topk_ids, topk_weights, w13, w2), _ = arguments()
    mask = torch.arange(9) % 2 == 0
    operands = Operands(x, topk_ids, topk_weights, w13, w2, mask)
    expected = problem(5, 2, 9, num_local_experts=4, hidden_size=96, intermediate_size=96, a_format="fp8", epilogue="atomic")
    assert launch.problem_of(operands, SWIGLU, "fp8", "atomic") == dataclasses.replace(expected, target_kind="c", num_sms=0)
