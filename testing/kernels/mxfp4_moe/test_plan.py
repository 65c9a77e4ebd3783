"""The plan of `mxfp4_moe` on a driver that writes down its launches: those of kernel by kernel, for any number of tokens."""

import dataclasses
import itertools

import pytest
import torch
from kernels.mxfp4_moe.operands import SWIGLU
from launch.fakes import FakeCuda, compile_without_nvcc

from tilelang_ext.kernels.mxfp4_moe import launch as launches
from tilelang_ext.kernels.mxfp4_moe import operator
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights, tile_for_hopper, to_arguments
from tilelang_ext.launch import record
from tilelang_ext.launch.device import Target

EXPERTS, TOP_K, H, I = 4, 2, 128, 64
FORMATS = ["bfloat16", "fp8"]


@pytest.fixture
def cuda(monkeypatch):
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(operator, "target_of", lambda name, device: Target("cuda", "sm_90a", 132))
    return cuda


def weights(a_format=None):
    def prepared(rows, k, gate=None):
        codes = torch.randint(0, 256, (EXPERTS, rows, k // 2), dtype=torch.uint8)
        return prepare_mxfp4_weights(codes, torch.full((EXPERTS, rows, k // 32), 120, dtype=torch.uint8), gate=gate)

    pair = prepared(2 * I, H, "separated"), prepared(H, I)
    return pair if a_format is None else tuple(tile_for_hopper(each, a_dtype=a_format) for each in pair)


def call(tokens, pair, a_format, mask=None, ids_dtype=torch.int64):
    """Operands, the problem that an H200 has, and the arguments of the torch operator."""
    x, ids, row_weights = (
        torch.zeros(tokens, H).bfloat16(),
        torch.zeros(tokens, TOP_K, dtype=ids_dtype),
        torch.rand(tokens, TOP_K),
    )
    operands, out = Operands(x, ids, row_weights, *pair, mask), torch.empty_like(x)
    problem = launches.problem_of(operands, SWIGLU, a_format, "reduce")
    options = SWIGLU.name, SWIGLU.alpha, SWIGLU.limit, a_format, "reduce"
    arguments = (x, ids, row_weights, *to_arguments(pair[0]), *to_arguments(pair[1]), *options, mask, out)
    return operands, dataclasses.replace(problem, target_kind="cuda", num_sms=132), arguments


def one_by_one(cuda, problem, operands, out):
    """Launch every kernel by a plan of its own, on the tensors that torch allocates."""

    def compiled(make, arguments, device, pass_configs):
        lowered, cubin = record.kernel(make, arguments, "sm_90a", pass_configs)
        return lowered.plan(cubin, cuda.launcher)

    launches.launch(problem, operands, out, compiled=compiled)


def without_addresses(launch, given):
    """A launch with the addresses of tensors that are not the caller's as None."""
    known = {x.data_ptr() for x in given if isinstance(x, torch.Tensor)}
    parameters = [value if value < 2**32 or value in known else value >> 64 or None for value in launch.parameters]
    return launch._replace(parameters=parameters)


@pytest.mark.parametrize(
    ("a_format", "calls", "compiled"), [("bfloat16", (1, 5, 520, 601), [1, 520]), ("fp8", (1, 5), [1])], ids=FORMATS
)
def test_as_kernel_by_kernel(cuda, a_format, calls, compiled):
    """Grids, scalars, descriptors' extents, memory of the caller: each from the shapes of one call, and from expressions.

    With fp8, few tokens have the kernels that many have with bfloat16, and those that quantise.
    """
    pair, plan = weights(a_format), cuda.launcher.plan(launches.RECIPE)
    compiled_for = []
    for tokens in calls:
        operands, problem, arguments = call(tokens, pair, a_format)
        cuda.driver.fake_reset()
        one_by_one(cuda, problem, operands, arguments[-1])
        wanted = cuda.launches()
        cuda.driver.fake_reset()
        if not plan.launch(*launches.to_plan(arguments)):
            compiled_for.append(tokens)
            operator._launch_plan(plan, problem, operands, arguments)
        got = cuda.launches()
        assert [done.kernel for done in got] == [done.kernel for done in wanted]
        for ours, theirs in zip(got, wanted, strict=True):
            assert without_addresses(ours, arguments) == without_addresses(theirs, arguments)
        assert got[0].kernel == ("count_slots_kernel" if tokens * TOP_K > 1024 else "moe_sort_kernel")
    assert compiled_for == compiled, "other numbers of tokens have variants already"


def test_general_weights(cuda):
    """The kernels that every GPU has, for weights as they are."""
    pair, plan = weights(), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(3, pair, "bfloat16")
    one_by_one(cuda, problem, operands, arguments[-1])
    wanted = cuda.launches()
    cuda.driver.fake_reset()
    operator._launch_plan(plan, problem, operands, arguments)
    assert [(done.kernel, done.grid, done.block) for done in cuda.launches()] == [
        (done.kernel, done.grid, done.block) for done in wanted
    ]


def test_workspace_slots_do_not_meet(cuda):
    """What kernels hand on lies apart, whatever the number of tokens, and within what is allocated."""
    pair, plan = weights("bfloat16"), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(5, pair, "bfloat16")
    operator._launch_plan(plan, problem, operands, arguments)
    [allocated] = cuda.lines("allocate")
    sort = cuda.launches()[0]
    slots = sorted({value for value in sort.parameters if value > 2**32} - {x.data_ptr() for x in operands[:3]})
    slots = [slot for slot in slots if slot - min(slots) < int(allocated.split()[1])]
    assert all(second - first >= 256 for first, second in itertools.pairwise(slots))


def test_mask_of_experts_elsewhere(cuda):
    """A mask becomes int32 before the plan, which has a variant for it."""
    pair, plan = weights("bfloat16"), cuda.launcher.plan(launches.RECIPE)
    every = torch.ones(EXPERTS, dtype=torch.bool)
    for count, mask in enumerate((None, every, None, every), 1):
        operands, problem, arguments = call(2, pair, "bfloat16", mask)
        operator._launch_plan(plan, problem, operands, arguments)
        assert len(cuda.launches()) == 4 * count
    assert len(cuda.lines("load")) == 8


def test_what_kernels_cannot_read_is_copied(cuda):
    pair, plan = weights("bfloat16"), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(2, pair, "bfloat16")
    wide, half = torch.zeros(2, 2 * H).bfloat16()[:, :H], operands.topk_weights.bfloat16()
    changed = operands._replace(x=wide, topk_weights=half)
    operator._launch_plan(plan, problem, changed, (wide, arguments[1], half, *arguments[3:]))
    assert len(cuda.launches()) == 4
    given = {value for done in cuda.launches() for value in done.parameters}
    assert not given & {wide.data_ptr(), half.data_ptr()}


def test_a_capture_that_needs_a_new_variant(cuda, monkeypatch):
    """Its mask would be the graph's: the kernels are launched one by one, and the plan is left as it is."""
    pair, plan = weights("bfloat16"), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(2, pair, "bfloat16")
    launched = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launches, "launch", lambda *given: launched.append(given))
    operator._launch_plan(plan, problem, operands, arguments)
    assert len(launched) == 1
    assert plan.launch(*launches.to_plan(arguments)) is False


@pytest.mark.parametrize(("tokens", "bounds"), [(1, (1, 12)), (12, (1, 12)), (13, (13, 24)), (600, (513, 12496))])
def test_tokens_that_share_kernels(tokens, bounds):
    _, problem, _ = call(tokens, weights("bfloat16"), "bfloat16")
    assert launches.tokens_of_kernels(problem) == bounds
    assert launches.tokens_of_kernels(dataclasses.replace(problem, tokens=bounds[1] + 1))[0] == bounds[1] + 1


def test_atomic_sums_have_no_plan():
    _, problem, _ = call(1, weights("bfloat16"), "bfloat16")
    assert launches.has_plan(problem)
    assert not launches.has_plan(dataclasses.replace(problem, epilogue="atomic"))
    assert not launches.has_plan(dataclasses.replace(problem, target_kind="hip"))


@pytest.mark.parametrize("a_format", FORMATS)
def test_out_without_the_dispatcher(cuda, monkeypatch, a_format):
    """The function launches what the operator does, with the fields of the weights; other arguments reach the operator."""
    pair, plan = weights(a_format), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(5, pair, a_format)
    operator._launch_plan(plan, problem, operands, arguments)
    wanted, given, out = cuda.launches(), operands[:3], arguments[-1]
    monkeypatch.setattr(launches.directly, "value", plan.launch_directly)
    a_dtype = {"bfloat16": None, "fp8": torch.float8_e4m3fn}[a_format]
    assert operator.mxfp4_moe(*given, *pair, activation=SWIGLU, a_dtype=a_dtype, out=out) is out
    assert cuda.launches()[len(wanted) :] == wanted
    with pytest.raises(ValueError, match="w13 must be prepared with gate= and w2 without"):
        operator.mxfp4_moe(*given, pair[1], pair[0], activation=SWIGLU, a_dtype=a_dtype, out=out)
    with pytest.raises(TypeError, match="w13 must be MXFP4Weights or HopperWeights; got tuple"):
        operator.mxfp4_moe(*given, tuple(pair[0]), pair[1], activation=SWIGLU, a_dtype=a_dtype, out=out)
    assert len(cuda.launches()) == 2 * len(wanted)


def test_prepared_and_bound(cuda, monkeypatch):
    """`bind` compiles what is missing, and launches nothing; then each call is what the operator launches."""
    pair, plan = weights(), cuda.launcher.plan(launches.RECIPE)
    operands, problem, arguments = call(2, pair, "bfloat16")
    monkeypatch.setattr(launches, "plan", lambda: plan)
    monkeypatch.setattr(launches, "problem_of", lambda *given: problem)
    prepared = operator.mxfp4_moe.prepare(*pair, activation=SWIGLU)
    bound = prepared.bind(*operands[:3], out=arguments[-1])
    assert cuda.launches() == []
    bound()
    operator._launch_plan(plan, problem, operands, arguments)
    done = cuda.launches()
    half = len(done) // 2
    assert half
    assert done[:half] == done[half:]
    with pytest.raises(ValueError, match="mxfp4_moe: x must"):
        prepared.bind(operands.x[:, :64], *operands[1:3], out=arguments[-1])


def test_prepared_on_the_cpu():
    pair = weights()
    x, ids, row_weights = torch.randn(3, H).bfloat16(), torch.tensor([[0, 3], [2, 1], [1, 3]]), torch.rand(3, TOP_K)
    prepared, out = operator.mxfp4_moe.prepare(*pair, activation=SWIGLU), torch.full((3, H), torch.nan).bfloat16()
    prepared.bind(x, ids, row_weights, out=out)()
    wanted = operator.mxfp4_moe(x, ids, row_weights, *pair, activation=SWIGLU)
    assert torch.equal(out, wanted)
    assert torch.equal(prepared(x, ids, row_weights), wanted)
