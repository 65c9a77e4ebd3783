"""Small kernels whose launches tests look at: strides, TMA, clusters and PDL, blocks of rows."""

import tilelang.language as T


def nine_tensors():
    """Eight inputs (n, 256) with strides of their own for the first, a factor, and their sum."""
    n, stride = T.dynamic("n"), T.dynamic("stride")

    @T.prim_func
    def add(
        x0: T.StridedTensor((n, 256), (stride, 1), "float32"),
        x1: T.Tensor((n, 256), "float32"),
        x2: T.Tensor((n, 256), "float32"),
        x3: T.Tensor((n, 256), "float32"),
        x4: T.Tensor((n, 256), "float32"),
        x5: T.Tensor((n, 256), "float32"),
        x6: T.Tensor((n, 256), "float32"),
        x7: T.Tensor((n, 256), "float32"),
        factor: T.float32,
        out: T.Tensor((n, 256), "float32"),
    ):
        with T.Kernel(T.ceildiv(n, 4), threads=128) as bx:
            for i, j in T.Parallel(4, 256):
                if bx * 4 + i < n:
                    out[bx * 4 + i, j] = factor * (
                        x0[bx * 4 + i, j]
                        + x1[bx * 4 + i, j]
                        + x2[bx * 4 + i, j]
                        + x3[bx * 4 + i, j]
                        + x4[bx * 4 + i, j]
                        + x5[bx * 4 + i, j]
                        + x6[bx * 4 + i, j]
                        + x7[bx * 4 + i, j]
                    )

    return add


def matmul():
    """b is read by TMA, out of a pipeline."""
    m = T.dynamic("m")

    @T.prim_func
    def matmul(a: T.Tensor((m, 256), "bfloat16"), b: T.Tensor((512, 256), "bfloat16"), out: T.Tensor((m, 512), "float32")):
        with T.Kernel(T.ceildiv(512, 128), T.ceildiv(m, 64), threads=128) as (bx, by):
            a_s, b_s = T.alloc_shared((64, 64), "bfloat16"), T.alloc_shared((128, 64), "bfloat16")
            out_f = T.alloc_fragment((64, 128), "float32")
            T.clear(out_f)
            for k in T.Pipelined(4, num_stages=2):
                T.copy(a[by * 64, k * 64], a_s)
                T.copy(b[bx * 128, k * 64], b_s)
                T.gemm(a_s, b_s, out_f, transpose_B=True)
            T.copy(out_f, out[by * 64, bx * 128])

    return matmul


def two_kernels():
    """The second waits for the first, and may begin before its end; blocks of both are in clusters of two."""
    blocks, n = T.dynamic("blocks"), T.dynamic("n")

    @T.prim_func
    def twice(x: T.Tensor((blocks * 128,), "float32"), ids: T.Tensor((blocks,), "int32"), out: T.Tensor((n,), "float32")):
        with T.Kernel(2, blocks, threads=128, cluster_dims=(2, 1, 1)) as (bx, by):
            for i in T.Parallel(128):
                if bx == 0:
                    x[by * 128 + i] = T.cast(ids[by], "float32")
        with T.Kernel(T.ceildiv(n, 128), threads=128) as bx:
            T.pdl_sync()
            for i in T.Parallel(128):
                if bx * 128 + i < n:
                    out[bx * 128 + i] = x[bx * 128 + i]

    return twice


def double(columns):
    """The prim_func (x, y): y = 2 x."""
    n, step = T.dynamic("n"), T.dynamic("step")

    @T.prim_func
    def double(x: T.StridedTensor((n, columns), (step, 1), "float32"), y: T.Tensor((n, columns), "float32")):
        with T.Kernel(n, threads=32) as bx:
            for i in T.Parallel(columns):
                y[bx, i] = 2 * x[bx, i]

    return double


def add_blocks(block):
    """The prim_func (x, mask, out): out = x + mask, for blocks of rows."""
    blocks = T.dynamic("blocks")

    @T.prim_func
    def add(
        x: T.Tensor((blocks * block, 64), "float32"),
        mask: T.Tensor((64,), "float32"),
        out: T.Tensor((blocks, block, 64), "float32"),
    ):
        with T.Kernel(blocks, threads=64) as bx:
            for i, j in T.Parallel(block, 64):
                out[bx, i, j] = x[bx * block + i, j] + mask[j]

    return add
