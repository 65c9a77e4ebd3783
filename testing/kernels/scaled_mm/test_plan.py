"""The plan of `scaled_mm` on a driver that writes down its launches: parameters of every recipe, and the way of a call."""

import pytest
import torch
from kernels.scaled_mm.operands import (
    MX,
    PAIRS,
    ROW,
    ROW_BLOCK,
    SQUARE_BLOCK,
    as_torch,
    operands,
)
from launch.fakes import FakeCuda, compile_without_nvcc
from torch.nn.functional import SwizzleType

from tilelang_ext.kernels.scaled_mm import arguments as checks
from tilelang_ext.kernels.scaled_mm import launch as launches
from tilelang_ext.kernels.scaled_mm import operator
from tilelang_ext.launch.device import Target

N, K = 256, 512


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """The fake driver, and an operator whose plan launches there."""
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    plan = cuda.launcher.plan(launches.RECIPE, launches.MEMBERS)
    monkeypatch.setattr(launches, "plan", lambda: plan)
    monkeypatch.setattr(operator, "target_of", lambda name, device: Target("cuda", "sm_90a", 132))
    return cuda


def arguments(M, recipes, bias=None, scales=None, fast=False):
    """Arguments of `scaled_mm_out` as torch documents them."""
    (a, scale_a, b, scale_b), _ = operands(M, N, K, recipes)
    scale_a, scale_b = scales or (as_torch(scale_a, recipes[0], "a"), as_torch(scale_b, recipes[1], "b"))
    tensors = [a, b.t(), scale_a, scale_b, bias, torch.empty(M, N, dtype=torch.bfloat16)]
    a, b, scale_a, scale_b, bias, out = (None if x is None else x.as_subclass(OnCuda) for x in tensors)
    options = checks.Options(recipes[0].value, 0, recipes[1].value, 0, fast)
    return a, b, scale_a, scale_b, bias, options.pack(), out


def checked_scales(given):
    *tensors, options, out = given
    return checks.check(*tensors, checks.unpack(options), out)


def addresses(given):
    return {x.data_ptr() for x in given if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("recipes", PAIRS, ids=lambda recipes: "-".join(recipe.name for recipe in recipes))
def test_parameters_of_few_rows(cuda, recipes):
    """Every tensor's address, and the strides of scales as `arguments.check` views them."""
    given = arguments(2, recipes)
    scales = checked_scales(given)
    for count in (1, 2):
        operator._scaled_mm_out(*given)
        assert len(cuda.launches()) == count
    done = cuda.launches()[0]
    assert done == cuda.launches()[1]
    assert set(done.parameters[:5]) == addresses(given)
    # A kernel takes the strides that it uses: of one block of rows none to the next.
    wanted = [stride for scale in scales for extent, stride in zip(scale.shape, scale.stride(), strict=True) if extent > 1]
    assert done.parameters[5:] == wanted


def test_batches_share_a_variant(cuda):
    """One kernel for 9 to 16 rows; the descriptor and the rows are those of the call."""
    for M in (9, 16):
        given = arguments(M, (ROW, ROW))
        operator._scaled_mm_out(*given)
        done = cuda.launches()[-1]
        assert done.parameters[5:].count(M) == 1, "beside addresses"
        assert given[0].data_ptr() | K << 64 | M << 128 in done.parameters
    assert len(cuda.lines("load")) == 1


def test_scales_of_blocks_on_hopper(cuda):
    given = arguments(16, (ROW_BLOCK, SQUARE_BLOCK))
    operator._scaled_mm_out(*given)
    scale_a, scale_b = checked_scales(given)
    assert cuda.launches()[0].parameters[-4:] == [*scale_a.stride(), *scale_b.stride()]


FORMS = {
    "(M,) and (N,)": (torch.rand(2), torch.rand(N)),
    "(M, 1) and (N, 1)": (torch.rand(2, 1), torch.rand(N, 1)),
    "(M, 1) and (1, N)": (torch.rand(2, 1), torch.rand(1, N)),
}


def test_forms_of_row_scales(cuda):
    """Each form has a variant of its own: one that is called with another's shape would read past its end."""
    for count, scales in enumerate(FORMS.values(), 1):
        given = arguments(2, (ROW, ROW), scales=scales)
        for _ in range(2):
            operator._scaled_mm_out(*given)
        assert len(cuda.launches()) == 2 * count
        assert set(cuda.launches()[-1].parameters[:5]) == addresses(given)


def test_what_kernels_cannot_read_is_copied(cuda):
    """Rows of a that lie apart, a bias and scales with steps, a scale that starts between multiples of 16 bytes."""
    given = list(arguments(2, (ROW, ROW), bias=torch.rand(2 * N)[::2], scales=(torch.rand(3)[1:], torch.rand(2 * N)[::2])))
    given[0] = given[0].repeat(1, 2)[:, :K]
    operator._scaled_mm_out(*given)
    [done] = cuda.launches()
    passed_on = set(done.parameters[:6]) & addresses(given)
    assert passed_on == {given[1].data_ptr(), given[-1].data_ptr()}


def test_swizzled_scales(cuda):
    """They are put in order first, and then are scales as any others."""
    swizzled = [torch.full((128 * 16,), 127, dtype=torch.uint8), torch.full((N * 16,), 127, dtype=torch.uint8)]
    given = list(arguments(2, (MX, MX), scales=swizzled))
    given[5] = checks.unpack(given[5])._replace(swizzle_a=1, swizzle_b=1).pack()
    for count in (1, 2):
        operator._scaled_mm_out(*given)
        assert len(cuda.launches()) == count
    assert len(cuda.lines("load")) == 1


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (3, torch.rand(N + 1), ValueError, r"scaled_mm: scale_b must have shape .*; got \(257,\)"),
        (6, torch.empty(2, N + 1, dtype=torch.bfloat16), ValueError, r"scaled_mm: out must be contiguous of shape \(2, 256\)"),
        (0, torch.zeros(2, K), TypeError, "scaled_mm: mat_a must be one of .*; got torch.float32; quantise it"),
    ],
)
def test_errors_are_the_operator_s(cuda, place, value, error, message):
    """Also where a variant is there: what it refuses is refused with the operator's rule."""
    given = list(arguments(2, (ROW, ROW), scales=(torch.rand(2), torch.rand(N))))
    operator._scaled_mm_out(*given)
    given[place] = value.as_subclass(OnCuda)
    with pytest.raises(error, match=message):
        operator._scaled_mm_out(*given)
    assert len(cuda.launches()) == 1


def test_nothing_is_launched_of_no_rows(cuda):
    operator._scaled_mm_out(*arguments(0, (ROW, ROW), scales=(torch.rand(0), torch.rand(N))))
    assert cuda.launches() == []


def test_the_kernel_by_fast_accumulation(cuda):
    """Accumulators that stay in the tensor core are those of another kernel."""
    for fast in (False, True, False):
        operator._scaled_mm_out(*arguments(2, (ROW, ROW), fast=fast))
    assert len(cuda.lines("load")) <= 2
    assert len(cuda.launches()) == 3


def test_options_are_one_integer():
    """By the members of torch's enums, and by the longer way for lists and members that were made anew."""
    wanted = checks.Options(ROW_BLOCK.value, 0, SQUARE_BLOCK.value, 1, True)
    for recipe, swizzle in ((ROW_BLOCK, None), ([ROW_BLOCK], []), (type(ROW)(ROW_BLOCK.value), SwizzleType.NO_SWIZZLE)):
        packed = checks.options_of(recipe, swizzle, SQUARE_BLOCK, SwizzleType.SWIZZLE_32_4_4, True)
        assert checks.unpack(packed) == wanted
    with pytest.raises(
        TypeError, match=r"scaled_mm: scale_recipe_b must be a torch.nn.functional.ScalingType; got int; pass one"
    ):
        checks.options_of(ROW, None, 1, None, False)


def test_out_without_the_dispatcher(cuda, monkeypatch):
    """The function launches what the operator does; what the plan does not take directly reaches the operator."""
    given = arguments(2, (ROW, ROW), scales=(torch.rand(2), torch.rand(N)))
    operator._scaled_mm_out(*given)
    a, b, scale_a, scale_b, _, _, out = (x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x for x in given)
    reached = []
    monkeypatch.setattr(launches.directly, "value", launches.plan().launch_directly)
    monkeypatch.setattr(operator, "_scaled_mm_out_op", lambda *arguments: reached.append(arguments))
    assert operator.scaled_mm(a, b, scale_a, ROW, scale_b, ROW, out=out) is out
    first, second = cuda.launches()
    assert (first, reached) == (second, [])
    for changed in ({"use_fast_accum": True}, {"bias": torch.rand(N)}, {"scale_a": torch.rand(2, requires_grad=True)}):
        options = {"scale_a": scale_a, "bias": None, "use_fast_accum": False, **changed}
        operator.scaled_mm(a, b, scale_recipe_a=ROW, scale_b=scale_b, scale_recipe_b=ROW, out=out, **options)
    assert len(reached) == 3
    with pytest.raises(TypeError, match=r"scale_recipe_a must be a torch.nn.functional.ScalingType; got int"):
        operator.scaled_mm(a, b, scale_a, ROW.value, scale_b, ROW, out=out)
    with pytest.raises(TypeError, match=r"output_dtype must be float32, float16 or bfloat16; got torch.int8"):
        operator.scaled_mm(a, b, scale_a, ROW, scale_b, ROW, output_dtype=torch.int8, out=out)
    assert len(cuda.launches()) == 2


@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK)], ids=["rows", "blocks"])
def test_prepared_and_bound(cuda, recipes):
    """`bind` compiles what is missing, and launches nothing; then each call is the launch that the operator makes."""
    given = arguments(16, recipes)
    a, b, scale_a, scale_b, bias, _, out = given
    prepared = operator.scaled_mm.prepare(b, scale_b, *recipes, bias=bias)
    bound = prepared.bind(a, scale_a, out=out)
    assert cuda.launches() == []
    bound()
    operator._scaled_mm_out(*given)
    first, second = cuda.launches()
    assert first == second
    assert len(cuda.lines("load")) == 1
    with pytest.raises(ValueError, match=r"scaled_mm: mat_a .*contiguous|scaled_mm: mat_a must"):
        prepared.bind(a.repeat(1, 2)[:, :K], scale_a, out=out)
    with pytest.raises(ValueError, match=r"scaled_mm: out must be contiguous of shape \(16, 256\)"):
        prepared.bind(a, scale_a, out=out[:3])


def test_prepared_on_the_cpu():
    (a, scale_a, b, scale_b), _ = operands(3, N, K, (ROW, ROW))
    scale_a, scale_b = as_torch(scale_a, ROW, "a"), as_torch(scale_b, ROW, "b")
    prepared = operator.scaled_mm.prepare(b.t(), scale_b, ROW, ROW, output_dtype=torch.float32)
    wanted = operator.scaled_mm(a, b.t(), scale_a, ROW, scale_b, ROW, output_dtype=torch.float32)
    out = torch.full((3, N), torch.nan)
    prepared.bind(a, scale_a, out=out)()
    assert torch.equal(out, wanted)
    assert torch.equal(prepared(a, scale_a), wanted)
