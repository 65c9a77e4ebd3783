"""What threads of a warp or block do together: a row of the output for each name, a number for each of 128 threads."""

import numpy as np
from language.table.rows import Recorder, Row

from tilelang_ext import language

THREADS = 128
WIDTH = 32


def inputs(seed: int = 1) -> dict[str, np.ndarray]:
    """x: small integers as floats, n: integers from 0 to 9."""
    random = np.random.default_rng(seed)
    return {"x": random.integers(-9, 9, THREADS).astype(np.float32), "n": random.integers(0, 10, THREADS).astype(np.int32)}


def waves(values, wave: int):
    """Return what is one row per warp."""
    return np.asarray(values).reshape(-1, wave)


def _by_32(function):
    """What `function(values of 32 threads)` gives each of them: reductions and shuffles have this width on every target."""
    return lambda x, n, wave: np.concatenate([np.broadcast_to(function(part), WIDTH) for part in waves(x, WIDTH)])


def _vote(function):
    return lambda x, n, wave: np.concatenate([np.full(wave, function(part)) for part in waves(n > 4, wave)])


def _mask(part) -> int:
    return sum(1 << lane for lane, bit in enumerate(part) if bit)


def _from(source):
    """x of another lane of the same warp, which wraps around in what is compared only where it exists."""

    def want(x, n, wave):
        lanes = np.arange(THREADS) % WIDTH
        return np.where(
            (source(lanes) >= 0) & (source(lanes) < WIDTH), x[(np.arange(THREADS) - lanes + source(lanes)) % THREADS], np.nan
        )

    return want


def row(name: str, emit, want) -> Row:
    """A row of threads: refused on target c, which has one."""
    if name.startswith("get_thread"):
        return Row(name, emit, want, refused={"c": r"target c: blocks have one thread; got thread index .+"})
    refused = {"c": rf"T\.{name}\b.*: .+; got it on target c; .+"}
    if name == "tvm_warp_activemask":
        refused["apple"] = r"T\.tvm_warp_activemask: must be an operator that target metal4? has; got a call of it; .+"
    if name in ("match_any_sync", "match_all_sync"):
        refused["hip"] = rf"T\.{name}: HIP has no match across lanes; got it on target hip; .+"
    return Row(name, emit, want, refused=refused)


ROWS = [
    row("shfl_xor", lambda T, t, x, n: T.shfl_xor(x, 5), _from(lambda lane: lane ^ 5)),
    row("shfl_sync", lambda T, t, x, n: T.shfl_sync(x, 7), _from(lambda lane: lane * 0 + 7)),
    row("shfl_up", lambda T, t, x, n: T.shfl_up(x, 3), _from(lambda lane: lane - 3)),
    row("shfl_down", lambda T, t, x, n: T.shfl_down(x, 3), _from(lambda lane: lane + 3)),
    row("warp_reduce_sum", lambda T, t, x, n: T.warp_reduce_sum(x), _by_32(np.sum)),
    row("warp_reduce_max", lambda T, t, x, n: T.warp_reduce_max(x), _by_32(np.max)),
    row("warp_reduce_min", lambda T, t, x, n: T.warp_reduce_min(x), _by_32(np.min)),
    row(
        "warp_reduce_bitand",
        lambda T, t, x, n: T.warp_reduce_bitand(n | 4),
        lambda x, n, wave: _by_32(np.bitwise_and.reduce)(n | 4, n, wave),
    ),
    row(
        "warp_reduce_bitor",
        lambda T, t, x, n: T.warp_reduce_bitor(n),
        lambda x, n, wave: _by_32(np.bitwise_or.reduce)(n, n, wave),
    ),
    row("any_sync", lambda T, t, x, n: language.if_then_else(T.any_sync(n > 4) != 0, 1, 0), _vote(np.any)),
    row("all_sync", lambda T, t, x, n: language.if_then_else(T.all_sync(n > 4) != 0, 1, 0), _vote(np.all)),
    row(
        "ballot",
        lambda T, t, x, n: language.cast(T.ballot(n > 4) & language.uint64(0x7FFFFFFF), "int32"),
        _vote(lambda part: _mask(part) & 0x7FFFFFFF),
    ),
    row(
        "ballot_sync",
        lambda T, t, x, n: language.cast(T.ballot_sync(n > 4) & language.uint64(0x7FFFFFFF), "int32"),
        _vote(lambda part: _mask(part) & 0x7FFFFFFF),
    ),
    row(
        "activemask",
        lambda T, t, x, n: language.cast(T.activemask() & language.uint64(0x7FFFFFFF), "int32"),
        lambda x, n, wave: np.full(THREADS, 0x7FFFFFFF),
    ),
    row("get_lane_idx", lambda T, t, x, n: T.get_lane_idx(), lambda x, n, wave: np.arange(THREADS) % wave),
    row("get_warp_idx", lambda T, t, x, n: T.get_warp_idx(), lambda x, n, wave: np.arange(THREADS) // wave),
    row("get_warp_idx_sync", lambda T, t, x, n: T.get_warp_idx_sync(), lambda x, n, wave: np.arange(THREADS) // wave),
    row("get_warp_group_idx", lambda T, t, x, n: T.get_warp_group_idx(16, 2), lambda x, n, wave: np.arange(THREADS) // 32),
    row("get_thread_binding", lambda T, t, x, n: T.get_thread_binding(0), lambda x, n, wave: np.arange(THREADS)),
    row("get_thread_bindings", lambda T, t, x, n: T.get_thread_bindings()[0], lambda x, n, wave: np.arange(THREADS)),
    row(
        "shuffle_elect",
        lambda T, t, x, n: language.if_then_else(T.shuffle_elect(32), 1, 0),
        lambda x, n, wave: (np.arange(THREADS) % 32 == 0).astype(np.int32),
    ),
    row("syncthreads_count", lambda T, t, x, n: T.syncthreads_count(n > 4), lambda x, n, wave: np.full(THREADS, np.sum(n > 4))),
    row(
        "syncthreads_and",
        lambda T, t, x, n: language.if_then_else(T.syncthreads_and(n >= 0) != 0, 1, 0),
        lambda x, n, wave: np.ones(THREADS),
    ),
    row(
        "syncthreads_or",
        lambda T, t, x, n: language.if_then_else(T.syncthreads_or(n > 100) != 0, 1, 0),
        lambda x, n, wave: np.zeros(THREADS),
    ),
    row(
        "match_any_sync",
        lambda T, t, x, n: language.cast(T.match_any_sync(n) & language.uint32(0x7FFFFFFF), "int32"),
        lambda x, n, wave: np.concatenate([[_mask(part == value) & 0x7FFFFFFF for value in part] for part in waves(n, wave)]),
    ),
    row(
        "match_all_sync",
        lambda T, t, x, n: language.if_then_else(T.match_all_sync(n) != 0, 1, 0),
        lambda x, n, wave: np.zeros(THREADS),
    ),
    row("tvm_warp_shuffle", lambda T, t, x, n: T.tvm_warp_shuffle(0xFFFFFFFF, x, 7, 32, 32), _from(lambda lane: lane * 0 + 7)),
    row(
        "tvm_warp_shuffle_up", lambda T, t, x, n: T.tvm_warp_shuffle_up(0xFFFFFFFF, x, 3, 32, 32), _from(lambda lane: lane - 3)
    ),
    row(
        "tvm_warp_shuffle_down",
        lambda T, t, x, n: T.tvm_warp_shuffle_down(0xFFFFFFFF, x, 3, 32, 32),
        _from(lambda lane: lane + 3),
    ),
    row(
        "tvm_warp_activemask",
        lambda T, t, x, n: language.cast(language.cast(T.tvm_warp_activemask(), "uint32") & language.uint32(255), "int32"),
        lambda x, n, wave: np.full(THREADS, 255),
    ),
]


def kernel(rows, T=None):
    """F[k] or I[k], by its type, is what row k computes; the other one stays 0."""
    T = T or Recorder()
    count = len(rows)

    @language.macro
    def store(F, I, k, t, value):
        if value.dtype == "float32":
            F[k, t] = value
        else:
            I[k, t] = value

    def emit(X, A, F, I, t):
        for k, line in enumerate(rows):
            store(F, I, k, t, line.emit(T, t, X[t], A[t]))

    @language.prim_func
    def threads(
        X: language.Tensor((THREADS,), "float32"), A: language.Tensor((THREADS,), "int32"),
        F: language.Tensor((count, THREADS), "float32"), I: language.Tensor((count, THREADS), "int32"),
    ):  # fmt: skip
        with language.Kernel(1, threads=THREADS):
            t = language.get_thread_binding()
            emit(X, A, F, I, t)

    return threads
