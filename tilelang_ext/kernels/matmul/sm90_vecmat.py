"""Matmul of one to four rows on Hopper: every element of b is read once, by loads of its own alignment, without tensor cores.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

| b | a block has | a thread has |
| --- | --- | --- |
| K-major | `columns` columns of out | every `threads`-th vector of their rows |
| N-major | as many columns as `lanes` threads load at once | a vector of columns, of every `threads / lanes`-th row |

A vector is what the alignment of rows of b allows, up to 16 bytes: rows of any number of elements are read where they lie. A
thread issues several loads before their arithmetic. The blocks of a cluster may divide K.
Floor on an H200: the bytes of b at 4.25e12 bytes/s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul import sm90_config
from tilelang_ext.kernels.matmul.epilogue import finished
from tilelang_ext.kernels.matmul.pad import is_padded
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Operands, Problem
from tilelang_ext.kernels.matmul.sm90_config import MOST_ROWS, rows_alike
from tilelang_ext.kernels.sm90 import cluster_sum, pdl

ARCH = "sm_90a"
_WARP = 32
_MOST_BLOCKS = 8  # of a cluster


@dataclass(frozen=True)
class Config:
    """Rows of a, elements of a load, threads of a block, loads in flight of a thread and row of b, columns or lanes along N."""

    rows: int
    vector: int
    threads: int
    loads: int
    columns: int
    blocks: int = 1  # of a cluster, which divide K

    @property
    def cluster_dims(self) -> dict:
        """Arguments of T.Kernel."""
        return {"cluster_dims": (self.blocks, 1, 1)} if self.blocks > 1 else {}


def columns_of_block(problem: Problem, config: Config) -> int:
    """Return the columns of out that a block has."""
    return config.columns if problem.b_is_k_major else config.columns * config.vector


def vecmat(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, out)."""
    M, N, K, types = _types(problem, config)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    @T.prim_func
    def vecmat(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        out: out_type,
    ):
        _vecmat(problem, config, Operands(a, b, row_scale, column_scale, bias, residual, out), (M, N, K))

    return vecmat


def _types(problem: Problem, config: Config) -> tuple:
    def multiple(name: str):
        return T.dynamic(f"{name}_vectors") * config.vector if config.vector > 1 else T.dynamic(name)

    M = T.dynamic("M")
    N, K = (T.dynamic("N"), multiple("K")) if problem.b_is_k_major else (multiple("N"), T.dynamic("K"))
    return M, N, K, problem.types(M, N, K)


@T.macro
def _vecmat(problem, config, operands, sizes):
    blocks = T.ceildiv(sizes[1], columns_of_block(problem, config)) * config.blocks
    with T.Kernel(blocks, threads=config.threads, **config.cluster_dims) as block:
        bx = block // config.blocks
        by = block % config.blocks
        if config.blocks > 1:
            cluster_sum.declare()
        pdl.trigger()
        pdl.wait()
        if problem.b_is_k_major:
            _multiply_rows(problem, config, operands, sizes, bx, by)
        else:
            _multiply_columns(problem, config, operands, sizes, bx, by)


@T.macro
def _multiply_rows(problem, config, operands, sizes, bx, by):
    (M, N, K), vector, rows, columns = sizes, config.vector, config.rows, config.columns
    loads, threads = config.loads, config.threads
    tx = T.get_thread_binding()
    a, b = operands.a, operands.b
    a_l = T.alloc_local((loads * rows * vector,), problem.dtype)
    b_l = T.alloc_local((loads * columns * vector,), problem.dtype)
    sums = T.alloc_local((rows * columns,), "float32")
    sums_s = T.alloc_shared((threads // _WARP, rows * columns), "float32")
    for i in T.unroll(rows * columns):
        sums[i] = 0
    vectors = T.alloc_var("int32", T.truncdiv(K, vector))
    of_block = T.alloc_var("int32", T.truncdiv(vectors + config.blocks - 1, config.blocks))
    begin = T.alloc_var("int32", by * of_block)
    end = T.alloc_var("int32", T.min(begin + of_block, vectors))
    for step in T.serial(T.ceildiv(end - begin, threads * loads)):
        for u in T.unroll(loads):
            # Loads past the end read what is there, and are left out of the sums.
            index = T.min(begin + (step * loads + u) * threads + tx, vectors - 1)
            for j in T.unroll(columns):
                for v in T.vectorized(vector):
                    b_l[(u * columns + j) * vector + v] = b[T.min(bx * columns + j, N - 1), index * vector + v]
            for i in T.unroll(rows):
                for v in T.vectorized(vector):
                    a_l[(u * rows + i) * vector + v] = a[T.min(i, M - 1), index * vector + v]
        for u in T.unroll(loads):
            if begin + (step * loads + u) * threads + tx < end:
                for j in T.unroll(columns):
                    for i in T.unroll(rows):
                        for v in T.unroll(vector):
                            sums[i * columns + j] += T.cast(a_l[(u * rows + i) * vector + v], "float32") * T.cast(
                                b_l[(u * columns + j) * vector + v], "float32"
                            )
    for i in T.unroll(rows * columns):
        sums[i] = T.warp_reduce_sum(sums[i])
    if tx % _WARP == 0:
        for i in T.unroll(rows * columns):
            sums_s[tx // _WARP, i] = sums[i]
    T.sync_threads()
    sums[0] = 0
    if tx < rows * columns:
        for warp in T.unroll(threads // _WARP):
            sums[0] += sums_s[warp, tx]
    _store(problem, config, operands, sizes, sums[0], columns, 0, bx, by)


@T.macro
def _multiply_columns(problem, config, operands, sizes, bx, by):
    (M, N, K), vector, rows, lanes = sizes, config.vector, config.rows, config.columns
    loads, threads = config.loads, config.threads
    tx = T.get_thread_binding()
    a, b = operands.a, operands.b
    a_l = T.alloc_local((loads * rows,), problem.dtype)
    b_l = T.alloc_local((loads * vector,), problem.dtype)
    sums = T.alloc_local((rows * vector,), "float32")
    k_lanes, outputs = threads // lanes, rows * lanes * vector
    sums_s = T.alloc_shared((k_lanes, outputs), "float32")
    for i in T.unroll(rows * vector):
        sums[i] = 0
    of_block = T.alloc_var("int32", T.truncdiv(K + config.blocks - 1, config.blocks))
    begin = T.alloc_var("int32", by * of_block)
    end = T.alloc_var("int32", T.min(begin + of_block, K))
    vectors = T.alloc_var("int32", T.min(bx * lanes + tx % lanes, T.truncdiv(N, vector) - 1))
    for step in T.serial(T.ceildiv(end - begin, k_lanes * loads)):
        for u in T.unroll(loads):
            k = T.min(begin + (step * loads + u) * k_lanes + tx // lanes, K - 1)
            for v in T.vectorized(vector):
                b_l[u * vector + v] = b[k, vectors * vector + v]
            for i in T.unroll(rows):
                a_l[u * rows + i] = a[T.min(i, M - 1), k]
        for u in T.unroll(loads):
            if begin + (step * loads + u) * k_lanes + tx // lanes < end:
                for i in T.unroll(rows):
                    for v in T.unroll(vector):
                        sums[i * vector + v] += T.cast(a_l[u * rows + i], "float32") * T.cast(b_l[u * vector + v], "float32")
    for i in T.unroll(rows):
        for v in T.unroll(vector):
            sums_s[tx // lanes, (i * lanes + tx % lanes) * vector + v] = sums[i * vector + v]
    T.sync_threads()
    # Where there are more threads than sums, some add a part of each, and then those of one warp the parts.
    groups = max(1, threads // outputs)
    for n in T.unroll(max(1, outputs // threads)):
        output = n * threads + tx % outputs
        group = tx // outputs
        sums[0] = 0
        for k in T.unroll(k_lanes // groups):
            sums[0] += sums_s[group * (k_lanes // groups) + k, output]
        if groups > 1:
            T.sync_threads()
            sums_s[group, output] = sums[0]
            T.sync_threads()
            sums[0] = 0
            for k in T.unroll(groups):
                sums[0] += sums_s[k, output]
        _store(problem, config, operands, sizes, sums[0], lanes * vector, n * threads, bx, by)


@T.macro
def _store(problem, config, operands, sizes, value, columns, first, bx, by):
    """Store the sum of output first + thread of the block's (rows, columns), over the blocks of the cluster."""
    M, N = sizes[0], sizes[1]
    output = first + T.get_thread_binding()
    row = T.alloc_var("int32", T.truncdiv(output, columns))
    column = T.alloc_var("int32", bx * columns + T.truncmod(output, columns))
    total = T.alloc_var("float32", value)
    if config.blocks > 1:
        of_block_s = T.alloc_shared((config.threads,), "float32")
        T.sync_threads()  # its memory may be that of other sums
        of_block_s[T.get_thread_binding()] = total
        T.cluster_sync()
        total = 0
        if (by == 0) & (output < config.rows * columns):
            for block in T.unroll(config.blocks):
                total = total + cluster_sum.float_of(of_block_s, T.get_thread_binding(), block)
        T.cluster_sync()
    if (by == 0) & (output < config.rows * columns) & (row < M) & (column < N):
        operands.out[row, column] = T.cast(finished(problem.epilogue, operands, total, row, (column,)), problem.out_dtype)


# --- host ------------------------------------------------------------------------------------------------------------

PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_LAUNCH_US, _STEP_US = 2.0, 0.55  # of a step's loads, where nothing hides their latency
_MEMORY = 4.4e6  # bytes per microsecond
# Of an element of b, on the whole GPU: what every one takes, its part of a load, and its product with a row of a
_ELEMENT_US, _LOAD_US, _ROW_US = 3.6e-7, 3.1e-7, 3.6e-8


def takes(problem: Problem) -> bool:
    """One to four rows on Hopper: where operands would have to be copied for TMA, or tiles take longer."""
    if problem.arch != ARCH or problem.M > MOST_ROWS or not problem.a_is_k_major:
        return False
    if is_padded(problem.a_row) or is_padded(problem.b_row):
        return True
    return problem.b_is_k_major and predicted_us(problem) < sm90_config.least_us(problem)


def sizes_served(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows that have the kernels of the problem."""
    return rows_alike(problem.M)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return a function of tensors that launches the kernel."""
    return device.compile(vecmat, problem.without_sizes("M", "N", "K"), pick_config(problem), pass_configs=PASS_CONFIGS)


def pick_config(problem: Problem) -> Config:
    """Return the configuration, as measured on an H200 (docs/log/matmul.md)."""
    _, rows = rows_alike(problem.M)
    vector = math.gcd(problem.b_row, TMA_ALIGNMENT)
    loads = TMA_ALIGNMENT // vector
    if not problem.b_is_k_major:
        width = 32  # columns of a block: a row of them is two sectors
        blocks = round(4 * problem.num_sms * width / problem.N)
        return Config(rows, vector, 256, 8, width // vector, max(1, min(_MOST_BLOCKS, problem.K // 256, blocks)))
    if 8 * problem.num_sms > problem.N:  # few columns: more threads for each
        return Config(rows, vector, 256, loads, 2)
    has_two = vector == TMA_ALIGNMENT and rows <= 2 and 2 * 128 * vector <= problem.K
    return Config(rows, vector, 128, 2 * loads if has_two else loads, 4)


def predicted_us(problem: Problem) -> float:
    """Return the time that the model predicts for a K-major b."""
    config, elements = pick_config(problem), problem.N * problem.K
    steps = -(-problem.K // (config.vector * config.threads * config.loads))
    of_elements = elements * (_ELEMENT_US + _LOAD_US / config.vector + _ROW_US * config.rows)
    return _LAUNCH_US + max(2 * elements / _MEMORY, of_elements, steps * _STEP_US)
