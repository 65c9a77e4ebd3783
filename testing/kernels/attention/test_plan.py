"""The plans of `attention` and `attention_decode` on a driver that writes down its launches: which kernels, which tensors."""

import pytest
import torch
from kernels.attention.operands import BF16, E4M3
from launch.fakes import FakeCuda, compile_without_nvcc

from tilelang_ext.kernels.attention import decode_launch, operator
from tilelang_ext.kernels.attention import launch as launches
from tilelang_ext.kernels.attention.arguments import Arguments
from tilelang_ext.launch.device import Target


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)


def on_cuda(*tensors):
    return [None if x is None else x.as_subclass(OnCuda) for x in tensors]


@pytest.fixture
def cuda(monkeypatch):
    """The fake driver, and operators whose plans launch there."""
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    for file in (launches, decode_launch):
        plan = cuda.launcher.plan(file.RECIPE)
        monkeypatch.setattr(file, "plan", lambda plan=plan: plan)
        monkeypatch.setattr(file, "_unused", lambda device, original=file._unused: original(torch.device("cpu")))
        monkeypatch.setattr(file, "target_of", lambda name, device: Target("cuda", "sm_90a", 132))
    return cuda


def arguments(batch, S_q, S_k, heads, kv_heads, sinks=None, dtype=BF16, causal=1):
    q, k = (torch.zeros(batch, S, h, 64).to(dtype) for S, h in ((S_q, heads), (S_k, kv_heads)))
    tensors = on_cuda(q, k, k.clone(), sinks, *[None] * 5)
    return (*tensors, causal, 0, 0.125, *on_cuda(torch.empty(q.shape, dtype=BF16), torch.empty(batch, heads, S_q)))


def test_attention(cuda):
    """One kernel serves every number of sequences, tokens and heads; what it cannot read is copied, or refused by the rule."""
    for sizes in ((2, 100, 300, 4, 2), (1, 7, 8, 3, 3)):
        given = arguments(*sizes)
        operator._out(*given)
        [done] = cuda.launches()[-1:]
        assert (done.kernel, done.grid, done.block) == ("attention_kernel", (132, 1, 1), (512, 1, 1))
        addresses = {parameter & (1 << 64) - 1 for parameter in done.parameters}
        assert {given[i].data_ptr() for i in (0, 1, 2, -2, -1)} <= addresses
        assert {sizes[0], *sizes[1:]} - {64} <= set(done.parameters)
    assert len(cuda.lines("load")) == 1
    given = list(arguments(1, 7, 8, 3, 3))
    given[1] = given[1].repeat(1, 1, 2, 1)[:, :, :3]
    operator._out(*given)
    addresses = {parameter & (1 << 64) - 1 for parameter in cuda.launches()[-1].parameters}
    assert given[1].data_ptr() not in addresses
    assert given[2].data_ptr() in addresses
    count = len(cuda.launches())
    huge = on_cuda(torch.zeros(1, 1, 1, 1, dtype=BF16).expand(2, 1 << 15, 512, 64))[0]
    with pytest.raises(ValueError, match=r"attention: q must have fewer than 2\^31 elements; got 2147483648; divide the batch"):
        launches.check_elements("attention", Arguments(huge, *[None] * 10), ("q",))
    with pytest.raises(ValueError, match="attention: heads of q must be a multiple of those of k; got 3 and 2"):
        operator._out(*arguments(1, 7, 8, 3, 2))
    without_keys = arguments(1, 7, 0, 3, 3)
    operator._out(*without_keys)
    assert not without_keys[-2].any()
    assert (without_keys[-1] == -torch.inf).all()
    assert len(cuda.launches()) == count


def test_codes(cuda):
    """Values are transposed first, and the parts of divided tiles are summed last: 2 of them after one full wave."""
    given = arguments(2, 192 * 67, 2000, 1, 1, dtype=E4M3, causal=0)
    operator._out(*given)
    launched = cuda.launches()[-3:]
    assert [done.kernel for done in launched] == ["transpose_kernel", "attention_kernel", "sum_parts_kernel"]
    assert [done.grid for done in launched] == [(16, 1, 2), (132, 1, 1), (12, 2, 1)]
    transpose, attend, total = ({parameter & (1 << 64) - 1 for parameter in done.parameters} for done in launched)
    assert given[2].data_ptr() in transpose - attend
    assert given[-2].data_ptr() in attend & total


def test_decode(cuda):
    """The number of ranges follows the sizes of the call; of more than eight rows a sum takes what the first kernel gives."""
    # 2 heads of keys; 132 SMs: one block on each, or 6 waves in place of one of 0.76, but no range of less than 512 keys
    for heads, batch, keys, splits in (
        (24, 1, 4096, 8),
        (24, 1, 65536, 64),
        (24, 50, 65536, 8),
        (24, 200, 4096, 2),
        (24, 1, 100, 1),
        (8, 1, 65536, 66),
        (16, 50, 65536, 8),
        (16, 256, 2048, 1),  # two blocks on each SM
    ):
        q, cache = torch.zeros(batch, 1, heads, 64, dtype=BF16), torch.zeros(batch, keys, 2, 64, dtype=BF16)
        seqlens, sinks = torch.full((batch,), keys, dtype=torch.int32), torch.zeros(heads)
        given = on_cuda(q, cache, cache.clone(), seqlens, None, None, None, sinks)
        given = (*given, 0, 0.125, *on_cuda(torch.empty_like(q), torch.empty(batch, heads, 1)))
        operator._decode_out(*given)
        if heads <= 16:
            first = total = cuda.launches()[-1]
            assert first.kernel == "attention_decode_kernel"
        else:
            first, total = cuda.launches()[-2:]
            assert (first.kernel, total.kernel) == ("split_kv_kernel", "sum_ranges_kernel")
            assert total.grid == (heads, batch, 1)
            assert 2 * splits in total.parameters
        assert first.grid == (splits, 2, batch)
        addresses = {parameter & (1 << 64) - 1 for parameter in first.parameters}
        assert {given[i].data_ptr() for i in range(4)} <= addresses
        assert {given[i].data_ptr() for i in (7, -2, -1)} <= {parameter & (1 << 64) - 1 for parameter in total.parameters}
    assert len(cuda.lines("load")) == 4
