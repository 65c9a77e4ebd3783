"""T.moe_gather, T.moe_scatter, T.swiglu, T.silu_mul: each alone, against plain torch, on every target; errors by message."""

import pytest
import torch
from language.mx_run import TARGETS, run
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import reference

TOKENS, TOP_K, BLOCK_M, H = 13, 3, 32, 80
WITH_CUDA = [*TARGETS, pytest.param("cuda", marks=pytest.mark.cuda)]


def sorted_ids():
    """Rows of distinct (token, slot) pairs with padding between, and tokens far out of range."""
    ids = torch.full((BLOCK_M,), (TOP_K << 24) | TOKENS, dtype=torch.int32)
    pairs = torch.randperm(TOKENS * TOP_K, generator=torch.Generator().manual_seed(0))[:20]
    ids[5:25] = (pairs // TOKENS << 24 | pairs % TOKENS).int()
    ids[30] = 0xFFFFFF
    return ids


@pytest.mark.parametrize("scope", ["shared", "fragment"])
@pytest.mark.parametrize("target", WITH_CUDA)
def test_gather(target, scope):
    """Two tiles of columns, the second past the end: padded rows and columns are zero."""
    X = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, out = sorted_ids(), torch.full((BLOCK_M, 96), torch.nan).bfloat16()

    @T.prim_func
    def kernel(
        X: T.Tensor((TOKENS, H), "bfloat16"), ids: T.Tensor((BLOCK_M,), "int32"), out: T.Tensor((BLOCK_M, 96), "bfloat16")
    ):
        with T.Kernel(2, threads=64) as t:
            tile = (
                T.alloc_shared((BLOCK_M, 48), "bfloat16") if scope == "shared" else T.alloc_fragment((BLOCK_M, 48), "bfloat16")
            )
            T.moe_gather(X[0:TOKENS, t * 48 : t * 48 + 48], ids, tile)
            T.copy(tile, out[0, t * 48])

    run(kernel, X, ids, out, target=target)
    token = (ids & 0xFFFFFF).long()
    expected = torch.zeros(BLOCK_M, 96).bfloat16()
    expected[token < TOKENS, :H] = X[token[token < TOKENS]]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["reduce", "atomic"])
@pytest.mark.parametrize("target", WITH_CUDA)
def test_scatter(target, mode):
    """What no row has stays as it was; weights are not zero in padding, which is dropped by its token alone."""
    generator = torch.Generator().manual_seed(2)
    acc, weights, ids = torch.randn(BLOCK_M, 96, generator=generator), torch.randn(BLOCK_M, generator=generator), sorted_ids()
    shape = (TOKENS, TOP_K, H) if mode == "reduce" else (TOKENS, H)

    @T.prim_func
    def kernel(
        acc: T.Tensor((BLOCK_M, 96), "float32"),
        ids: T.Tensor((BLOCK_M,), "int32"),
        weights: T.Tensor((BLOCK_M,), "float32"),
        Y: T.Tensor(shape, "float32"),
    ):
        with T.Kernel(2, threads=64) as t:
            acc_f = T.alloc_fragment((BLOCK_M, 48), "float32")
            T.copy(acc[0, t * 48], acc_f)
            columns = slice(t * 48, t * 48 + 48)
            T.moe_scatter(
                acc_f, ids, weights, Y[0:TOKENS, 0:TOP_K, columns] if mode == "reduce" else Y[0:TOKENS, columns], mode
            )

    Y = torch.full(shape, 7.0)
    expected = Y.double()
    run(kernel, acc, ids, weights, Y, target=target)
    rows = acc[:, :H].double() * weights[:, None].double()
    for row in range(5, 25):
        token, slot = int(ids[row]) & 0xFFFFFF, int(ids[row]) >> 24
        if mode == "reduce":
            expected[token, slot] = rows[row]
        else:
            expected[token] += rows[row]
    assert_close(Y, expected, dtype="float32")


@pytest.mark.parametrize(
    ("name", "gate", "source"),
    [
        ("swiglu", "interleaved", "fragment"),
        ("swiglu", "separated", "global"),
        ("silu_mul", "interleaved", "global"),
        ("silu_mul", "separated", "fragment"),
    ],
)
@pytest.mark.parametrize("target", WITH_CUDA)
def test_activations(target, name, gate, source):
    """Both sides of both limits, an alpha and a limit that are not the defaults; what is not a number stays none."""
    M, I = 32, 48
    gate_up = torch.randn(M, 2 * I, generator=torch.Generator().manual_seed(3)) * 6
    gate_up[3, 7], gate_up[30, 64] = torch.nan, torch.nan
    options = {"alpha": 1.25, "limit": 5.0} if name == "swiglu" else {}

    @T.prim_func
    def kernel(gate_up: T.Tensor((M, 2 * I), "float32"), out: T.Tensor((M, I), "float32")):
        with T.Kernel(1, threads=64) as _:
            out_f = T.alloc_fragment((M, I), "float32")
            if source == "fragment":
                gate_up_f = T.alloc_fragment((M, 2 * I), "float32")
                T.copy(gate_up, gate_up_f)
                getattr(T, name)(gate_up_f, out_f, gate=gate, **options)
            else:
                getattr(T, name)(gate_up, out_f, gate=gate, **options)
            T.copy(out_f, out)

    out = torch.full((M, I), torch.nan)
    run(kernel, gate_up, out, target=target)
    expected = getattr(reference, name)(gate_up, gate=gate, **options)
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected.isnan().sum() == 2
    assert_close(out.nan_to_num(0.0), expected.nan_to_num(0.0), dtype="float32")


def traced(call, *shapes):
    """Trace a kernel that calls an intrinsic on tensors of these (shape, dtype)."""
    A, B, C, D = [*shapes, *([((8,), "float32")] * (4 - len(shapes)))]

    @T.prim_func
    def kernel(A: T.Tensor(*A), B: T.Tensor(*B), C: T.Tensor(*C), D: T.Tensor(*D)):
        with T.Kernel(1, threads=64) as _:
            call(A, B, C, D)


X, IDS, WEIGHTS = ((13, 64), "bfloat16"), ((32,), "int32"), ((32,), "float32")
ACC = ((32, 64), "float32")


@pytest.mark.parametrize(
    ("call", "shapes", "error", "message"),
    [
        (
            lambda A, B, C, D: T.moe_gather(A, B, C),
            (X, IDS, ((32, 64), "bfloat16")),
            TypeError,
            "T.moe_gather: out must be fragm",
        ),
        (
            lambda A, B, C, D: T.moe_gather(T.alloc_shared((13, 64), "bfloat16"), B, T.alloc_shared((32, 64), "bfloat16")),
            (X, IDS),
            TypeError,
            "T.moe_gather: X must be global",
        ),
        (lambda A, B, C, D: T.moe_gather(A, B, C), (X, IDS, ACC), TypeError, "T.moe_gather: out must be bfloat16; got float32"),
        (lambda A, B, C, D: T.moe_scatter(A, B, C, D, "add"), (ACC, IDS, WEIGHTS), ValueError, "T.moe_scatter: mode must be"),
        (
            lambda A, B, C, D: T.moe_scatter(A, B, C, D),
            (ACC, IDS, WEIGHTS, ACC),
            ValueError,
            "Y must have at least 3 dimensions",
        ),
        (lambda A, B, C, D: T.swiglu(A, B, gate="both"), (ACC, ACC), ValueError, "T.swiglu: gate must be 'interleaved' or"),
        (lambda A, B, C, D: T.silu_mul(A, B), (ACC, ACC), ValueError, r"T.silu_mul: gate_up must have shape \(32, 128\)"),
        (lambda A, B, C, D: T.swiglu(A, B), (IDS, ACC), ValueError, "T.swiglu: gate_up must have at least 2 dimensions"),
    ],
)
def test_errors(call, shapes, error, message):
    with pytest.raises(error, match=message):
        traced(call, *shapes)
