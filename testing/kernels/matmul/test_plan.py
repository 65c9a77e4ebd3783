"""The plan of `matmul` on a driver that writes down its launches: which kernels, with which tensors, and for which rows."""

from dataclasses import replace

import pytest
import torch
from kernels.matmul.operands import BF16, problem
from launch.fakes import FakeCuda, compile_without_nvcc

from tilelang_ext.kernels.matmul import launch as launches
from tilelang_ext.kernels.matmul import operator, sm90_config, sm90_persistent
from tilelang_ext.kernels.matmul.arguments import number_of
from tilelang_ext.launch.device import Target

# Tile, stages, rows of A of a stage, tiles of a cluster, whether they share A, splits, whether operands are swapped, how K is
# divided among blocks; the rows that have the same choice.
PICKS = {
    (1, 4096, 4096): ((64, 16), 20, 64, 1, False, 2, True, "joins", (1, 16)),
    (20, 4096, 4096): ((64, 32), 18, 64, 1, False, 2, True, "joins", (17, 32)),
    (16, 1024, 8192): ((64, 16), 20, 64, 1, False, 8, True, "", (1, 16)),
    (64, 4096, 4096): ((64, 64), 14, 64, 1, False, 2, False, "joins", (49, 64)),
    (76, 4840, 5536): ((128, 80), 8, 128, 1, False, 3, True, "joins", (65, 80)),
    (100, 4096, 4096): ((64, 112), 10, 64, 1, False, 2, True, "joins", (97, 112)),
    (256, 4096, 4096): ((128, 128), 7, 128, 1, False, 2, False, "joins", (225, 256)),
    (300, 7168, 2048): ((128, 160), 5, 128, 1, False, 1, True, "", (289, 320)),
    (1000, 5120, 2048): ((256, 160), 4, 256, 1, False, 1, False, "", (961, 1024)),
    (2048, 4096, 4096): ((128, 256), 4, 128, 1, False, 1, False, "", (1537, 2048)),
    (4096, 2048, 2056): ((128, 256), 4, 128, 2, False, 1, False, "", (3841, 4096)),
    (5091, 848, 5720): ((256, 144), 4, 256, 2, True, 1, False, "", (4609, 5632)),
    (6167, 384, 15184): ((128, 192), 4, 128, 2, True, 1, False, "streams", (6145, 6272)),
    (8192, 8192, 8192): ((128, 256), 4, 128, 1, False, 1, False, "", (7105, 9216)),
}


def test_picks():
    """Whatever moves a choice was meant to: the model's numbers are measured on an H200."""
    for shape, wanted in PICKS.items():
        config, splits = sm90_config.pick_config(problem(*shape))
        tile = (config.block_M, config.block_N), config.num_stages, config.a_rows, config.cluster, config.shares_a
        ways = {"streams": config.streams, "adds": config.adds, "joins": config.joined > 1}
        got = *tile, splits, config.is_swapped, next((way for way, is_taken in ways.items() if is_taken), "")
        assert (*got, sm90_config.rows_of_choice(problem(*shape))) == wanted, shape


def test_tiles_fit():
    """64 rows of an MMA for each consumer, and columns in multiples of 16."""
    for tile in sm90_config.TILES:
        assert tile.block_M % (64 * tile.num_consumers) == 0, tile
        assert tile.block_N % 16 == 0, tile  # halves of a cluster begin at multiples of eight rows
        assert tile.a_rows in (16, 32, tile.block_M), tile


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """The fake driver, and an operator whose plan launches there, with the cheapest tile to lower."""
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    plan = cuda.launcher.plan(launches.RECIPE)
    monkeypatch.setattr(launches, "plan", lambda: plan)
    monkeypatch.setattr(operator, "target_of", lambda name, device: {"matmul": Target("cuda", "sm_90a", 132)}[name])
    tiles = [tile for tile in sm90_config.TILES if (tile.block_M, tile.block_N, tile.thin) == (64, 64, 0)]
    monkeypatch.setattr(sm90_config, "TILES", tuple(tiles))
    sm90_config._pick.cache_clear()
    yield cuda
    sm90_config._pick.cache_clear()


def arguments(M, N, K, a_is_k_major=True, b_is_k_major=True, **options):
    a = torch.zeros(M, K, dtype=BF16) if a_is_k_major else torch.zeros(K, M, dtype=BF16).t()
    b = torch.zeros(N, K, dtype=BF16).t() if b_is_k_major else torch.zeros(K, N, dtype=BF16)
    names = ("row_scale", "column_scale", "bias", "residual")
    tensors = [a, b, *(options.get(name) for name in names), torch.empty(M, N, dtype=BF16)]
    *inputs, out = (None if x is None else x.as_subclass(OnCuda) for x in tensors)
    return (*inputs, number_of(options.get("activation")), out)


def test_launches(cuda):
    """One kernel; rows of one choice share it; K in splits is two kernels, whose operands go to the one that needs them."""
    for M in (70, 100):
        given = arguments(M, 256, 128, row_scale=torch.ones(M), column_scale=torch.ones(256))
        operator._matmul_out(*given)
        [done] = cuda.launches()[-1:]
        assert done.kernel == "matmul_kernel"
        assert done.grid == (132, 1, 1)
        assert {given[0].data_ptr() | 128 << 64 | M << 128, given[-1].data_ptr() | 256 << 64 | M << 128} <= set(done.parameters)
        assert {given[2].data_ptr(), given[3].data_ptr()} <= set(done.parameters)
    assert len(cuda.lines("load")) == 1
    bias = torch.zeros(64)
    given = arguments(16, 64, 4096, bias=bias, activation="relu")
    operator._matmul_out(*given)
    product, total = cuda.launches()[-2:]
    assert (product.kernel, total.kernel) == ("partial_matmul_kernel", "sum_splits_kernel")
    assert given[1].data_ptr() | 4096 << 64 | 64 << 128 in product.parameters
    assert {bias.data_ptr(), given[-1].data_ptr()} <= set(total.parameters)
    splits = sm90_config.pick_config(problem(16, 64, 4096))[1]
    assert splits > 1
    assert splits in product.parameters
    assert splits in total.parameters


def test_one_block_adds(cuda, monkeypatch):
    """One kernel with the accumulators' memory, of as many tiles as this call has, here of swapped operands."""
    tile = next(tile for tile in sm90_config.TILES if (tile.block_M, tile.block_N, tile.is_swapped) == (64, 64, True))
    config = sm90_config.config_of(replace(tile, adds=True), problem(70, 200, 512), 3)
    monkeypatch.setattr(sm90_persistent, "pick_config", lambda of: (config, 3))
    given = arguments(70, 200, 512, row_scale=torch.ones(70))
    operator._matmul_out(*given)
    [done] = cuda.launches()
    assert done.kernel == "added_matmul_kernel"
    assert {3, 8, given[2].data_ptr()} <= set(done.parameters)  # splits, two by four tiles


def test_no_k(cuda, monkeypatch):
    """What follows the product is computed even so: of eight elements of K that are zeros."""
    taken = []
    monkeypatch.setattr(launches, "plan", lambda: FakePlan())
    monkeypatch.setattr(launches, "add_variant", lambda plan, arguments, of, implementation: taken.append((arguments, of)))
    operator._matmul_out(*arguments(3, 64, 0, bias=torch.ones(64)))
    [((a, b, *_), of)] = taken
    assert (a.shape, b.shape, of.K) == ((3, 8), (8, 64), 8)
    assert not a.any()
    assert not b.any()


class FakePlan:
    """Has no variant when it is asked to launch."""

    def launch(self, *arguments) -> bool:
        return False

    def __call__(self, *arguments) -> None:
        pass


def test_a_transpose_comes_first(cuda, monkeypatch):
    """Of a column-major a of few rows where the model says so: the product then reads the workspace."""
    monkeypatch.setattr(sm90_persistent, "is_turned", lambda of: not of.a_is_k_major)
    given = arguments(8, 64, 128, a_is_k_major=False, residual=torch.zeros(8, 64))
    operator._matmul_out(*given)
    turn, product = cuda.launches()
    assert (turn.kernel, product.kernel) == ("turn_kernel", "matmul_kernel")
    assert (turn.grid, turn.block) == ((1, 1, 1), (128, 1, 1))
    source, turned = turn.parameters[:2]
    assert source == given[0].data_ptr()
    assert {turned | 128 << 64 | 8 << 128, given[1].data_ptr() | 128 << 64 | 64 << 128} <= set(product.parameters)
    assert given[5].data_ptr() in product.parameters
    assert source not in product.parameters


def test_copies_with_longer_rows_come_first(cuda):
    """Of operands whose rows TMA does not take, each into a workspace that the product reads; N is that of out."""
    given = arguments(70, 75, 129, residual=torch.zeros(70, 75))
    operator._matmul_out(*given)
    copy, product = cuda.launches()
    assert (copy.kernel, product.kernel) == ("pad_both_kernel", "matmul_kernel")
    a, b = given[0].data_ptr(), given[1].data_ptr()
    [longer_a, longer_b] = (other for other in copy.parameters[:4] if other not in (a, b))
    assert {a, b} <= set(copy.parameters[:4])
    assert {longer_a | 144 << 64 | 70 << 128, longer_b | 144 << 64 | 75 << 128} <= set(product.parameters)
    assert {given[5].data_ptr(), given[-1].data_ptr()} <= set(product.parameters)
    assert not {a, b} & set(product.parameters)
    given = arguments(66, 72, 64, a_is_k_major=False)
    operator._matmul_out(*given)
    of_a, product = cuda.launches()[-2:]
    assert (of_a.kernel, product.kernel) == ("pad_kernel", "matmul_kernel")
    assert of_a.parameters[1] | 80 << 64 | 64 << 128 in product.parameters
    assert given[1].data_ptr() | 64 << 64 | 72 << 128 in product.parameters
    operator._matmul_out(*arguments(82, 72, 64, a_is_k_major=False))
    assert len(cuda.lines("load")) == 4  # two copies of different granules, two products


def test_what_kernels_cannot_read_is_copied(cuda):
    """Rows of a that lie apart; a bias with steps; a residual that starts between multiples of 16 bytes."""
    given = list(arguments(2, 64, 64, bias=torch.zeros(128)[::2], residual=torch.zeros(129)[1:].reshape(2, 64)))
    given[0] = given[0].repeat(1, 2)[:, :64]
    operator._matmul_out(*given)
    [done] = cuda.launches()
    addresses = {parameter & (1 << 64) - 1 for parameter in done.parameters}
    assert addresses & {x.data_ptr() for x in given if isinstance(x, torch.Tensor)} == {
        given[1].data_ptr(),
        given[-1].data_ptr(),
    }


def test_errors_are_the_operator_s(cuda):
    """Also where a variant is there: what it refuses is refused with the operator's rule."""
    given = list(arguments(2, 64, 64))
    operator._matmul_out(*given)
    given[-1] = torch.empty(2, 72, dtype=BF16).as_subclass(OnCuda)
    with pytest.raises(ValueError, match=r"matmul: out must be contiguous of shape \(2, 64\)"):
        operator._matmul_out(*given)
    operator._matmul_out(*arguments(0, 64, 64))
    assert len(cuda.launches()) == 1
