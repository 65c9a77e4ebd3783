"""The intrinsic in a kernel, for every operand major, element type and scale layout; lowered with no GPU."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import tilelang
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext.formats import BlockScaledLayout as L

ROW = (L.per_row(), L.per_row())
LAYOUTS = {
    "tensor": (L.per_tensor(), L.per_tensor()),
    "row": ROW,
    "block": (L.block(1, 128), L.block(128, 128)),
    "e8m0": (L.e8m0_k32(), L.e8m0_k32()),
}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


def matmul(
    M,
    N,
    K,
    layouts=ROW,
    a=E4M3,
    b=E4M3,
    out="float32",
    trans_A=False,
    trans_B=True,
    block_M=64,
    block_N=64,
    A_scope="global",
    name="matmul",
    **options,
):
    """C = scaled product; K is all of a tile's, and M and N may end inside one."""
    scale_dtype = ["uint8" if layout.scale_format else "float32" for layout in layouts]

    @T.prim_func
    def kernel(
        A: T.Tensor((K, M) if trans_A else (M, K), a),
        SA: T.Tensor(layouts[0].scale_shape(M, K), scale_dtype[0]),
        B: T.Tensor((N, K) if trans_B else (K, N), b),
        SB: T.Tensor(layouts[1].scale_shape(N, K), scale_dtype[1]),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=128) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            i, j = by * block_M, bx * block_N
            A_tile = A[0:K, i : i + block_M] if trans_A else A[i : i + block_M, 0:K]
            B_tile = B[j : j + block_N, 0:K] if trans_B else B[0:K, j : j + block_N]
            if A_scope == "fragment":
                A_f = T.alloc_fragment((block_M, K), a)
                T.copy(A_tile, A_f)
                T.fp8_scaled_matmul(
                    A_f,
                    SA[i : i + block_M, 0:1],  # a fragment has no place in the whole matrix
                    B_tile,
                    SB,
                    C_f,
                    transpose_B=trans_B,
                    scale_layout=layouts,
                    clear_accum=True,
                )
            else:
                T.fp8_scaled_matmul(
                    A_tile,
                    SA,
                    B_tile,
                    SB,
                    C_f,
                    transpose_A=trans_A,
                    transpose_B=trans_B,
                    scale_layout=layouts,
                    clear_accum=True,
                    **options,
                )
            T.copy(C_f, C[i, j])

    return kernel.with_attr("global_symbol", name)


_TEXTS = {}  # of all tests: (script, architecture, pass configurations): CUDA text


def lower(kernel, arch: str, **pass_configs) -> str:
    """Return the CUDA text of a kernel; nothing is compiled.

    What differs by its name alone is lowered once, since tests of values, of machine code and of barriers share kernels.
    """
    name = kernel.attrs["global_symbol"]
    kernel = kernel.with_attr("global_symbol", "kernel")
    key = kernel.script(show_meta=True), arch, tuple(sorted(pass_configs.items()))
    if key not in _TEXTS:
        target = Target({"kind": "cuda", "arch": arch})
        with target, tilelang.transform.PassContext(config=pass_configs):
            _TEXTS[key] = tilelang.lower(kernel, target=target, enable_device_compile=False).kernel_source
    return _TEXTS[key].replace("kernel_kernel", f"{name}_kernel")


def run_on_gpu(kernel, tensors, target="cuda", **pass_configs) -> None:
    """Run a kernel on the GPU on tensors given by name, and write what it left in them back."""
    names = [kernel.buffer_map[param].name for param in kernel.params]
    on_gpu = [tensors[name].cuda() for name in names]
    tilelang.compile(kernel, target=target, pass_configs=pass_configs)(*on_gpu)
    for name, tensor in zip(names, on_gpu, strict=True):
        tensors[name].copy_(tensor)
