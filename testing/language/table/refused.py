"""Instructions that belong to other processors: each is refused with one error that names it, on every target of the table."""

import inspect

from language.table.rows import Row

from tilelang_ext import language


def _refused(name: str, call) -> Row:
    """A row whose `call` gets the language and the operands of `kernel`."""
    return Row(name, call, refused={"all": rf"(T\.|, |or T\.){name}\b.*: .+; got it on target \w+; .+"})


def _plain(names: str, *arguments) -> list[Row]:
    return [_refused(name, lambda T, o, name=name: getattr(T, name)(*arguments)) for name in names.split()]


def _of(names: str, call) -> list[Row]:
    return [_refused(name, lambda T, o, name=name: call(getattr(T, name), o)) for name in names.split()]


def _required(names: str, operand) -> list[Row]:
    """Rows whose required parameters are each `operand(operands, position)`: what they are does not come to be looked at."""

    def call(function, operands):
        parameters = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        positional = [operand(operands, i) for i, p in enumerate(parameters) if p.kind == p.POSITIONAL_OR_KEYWORD]
        return function(*positional, **{p.name: 0 for p in parameters if p.kind == p.KEYWORD_ONLY})

    return _of(names, call)


ROWS = [
    *_plain(
        "cluster_arrive cluster_arrive_relaxed cluster_sync cluster_wait block_rank_in_cluster fence_proxy_async pdl_sync "
        "pdl_trigger ptx_fence_barrier_init sync_grid tcgen05_after_thread_sync tcgen05_before_thread_sync tma_store_arrive "
        "tma_store_wait warpgroup_arrive warpgroup_commit_batch rng_rand rng_rand_float vscale"
    ),
    *_plain("wait_wgmma warpgroup_wait", 0),
    *_plain("rng_init", 7),
    *_plain("named_barrier_arrive", 1, 64),
    *_plain("start_profile_intrinsic end_profile_intrinsic", 1),
    *_plain("call_packed call_cpacked tvm_call_packed tvm_call_cpacked", "name", 1),
    *_plain("call_packed_lowered call_cpacked_lowered tvm_call_packed_lowered tvm_call_cpacked_lowered", "name", 1),
    *_plain("tvm_throw_last_error"),
    *_plain("lookup_param", "name"),
    *_plain("tvm_stack_alloca", "arg_value", 1),
    *_plain("tvm_stack_make_shape", 1),
    *_plain("get_active_lane_mask", "boolx4", 0, 4),
    *_plain("create_barriers", 1),
    *_plain("ptx_cp_async_barrier ptx_arrive_barrier ptx_wait_barrier", 0),
    *_plain("ptx_arrive_barrier_expect_tx ptx_init_barrier_thread_count", 0, 64),
    *_of("alloc_barrier alloc_cluster_barrier", lambda f, o: f(64)),
    *_of("barrier_arrive mbarrier_arrive tcgen05_mma_arrive cp_async_barrier_noinc", lambda f, o: f(o.barrier)),
    *_of("barrier_wait mbarrier_wait_parity mbarrier_expect_tx mbarrier_arrive_expect_tx", lambda f, o: f(o.barrier, 0)),
    *_of("ptx_arrive_cluster_barrier", lambda f, o: f(o.barrier[0], 0)),
    *_of("alloc_tmem", lambda f, o: f((128, 64), "float32")),
    *_of("alloc_descriptor alloc_wgmma_desc alloc_tcgen05_smem_desc alloc_tcgen05_instr_desc alloc_tcgen05_instruction_desc",
         lambda f, o: f()),
    *_of("ldg32 ldg64 ldg128 ldg256", lambda f, o: f(o.A[0, 0:{"ldg32": 1}.get(f.__name__, 8)])),
    *_of("lds32 lds64 lds128", lambda f, o: f(o.S[0, 0])),
    *_of("wgmma_gemm wgmma_mma", lambda f, o: f(o.S, o.S, o.F)),
    *_of("tcgen05_gemm tcgen05_mma", lambda f, o: f(o.S, o.S, o.F, mbar=o.barrier)),
    *_of(
        "tcgen05_gemm_blockscaled tcgen05_mma_blockscaled",
        lambda f, o: f(
            o.S, o.S, o.F, o.S, o.S, mbar=o.barrier, k_start=0, sf_a_granularity_k=32, sf_b_granularity_k=32
        ),
    ),
    *_of("tma_copy", lambda f, o: f(o.A, o.S, barrier=o.barrier)),
    *_of("copy_cluster", lambda f, o: f(o.A, o.S, cluster_mask=3)),
    *_of("im2col c2d_im2col", lambda f, o: f(o.image, o.S, 0, 0, 3, 1, 1, 1)),
    *_of("create_tma_descriptor tma_load tma_load_2sm", lambda f, o: f(1, 2, 3)),
    *_required(
        "TVMBackendAllocWorkspace TVMBackendFreeWorkspace anylist_getitem anylist_resetitem anylist_setitem_call_cpacked "
        "anylist_setitem_call_packed ptx_ldmatrix ptx_mma_sm70 "
        "ptx_tcgen05_mma_blockscaled_ss ptx_tcgen05_mma_ss ptx_tcgen05_mma_ts "
        "tvm_bmma_sync tvm_fill_fragment tvm_load_matrix_sync tvm_mma_sync tvm_stack_make_array tvm_store_matrix_sync "
        "tvm_struct_set", lambda o, i: 0
    ),
    *_required(
        "mma_fill mma_store ptx_cp_async_bulk ptx_mma "
        "ptx_mma_block_scale ptx_mma_sp ptx_wgmma_rs ptx_wgmma_sp_rs ptx_wgmma_sp_ss "
        "ptx_wgmma_ss", lambda o, i: "float32" if i == 0 else 0
    ),
    *_required("tvm_struct_get", lambda o, i: "float32"),
    *_required(
        "tcgen05_cp_warpx4 tcgen05_sf_warp_transpose warpgroup_fence_operand", lambda o, i: o.S
    ),
    *_required(
        "increase_descriptor_offset initialize_wgmma_descriptor stg32 stg64 stg128 stg256 sts32 sts64 sts128",
        lambda o, i: o.S[0, 0]
    ),
    *_of("deallocate_tmem", lambda f, o: f(language.alloc_tmem((128, 64), "float32"))),
    *_of("initialize_tcgen05_descriptor", lambda f, o: f(language.alloc_tcgen05_smem_desc(), 0, 16, 16)),
    *_of("gemm_sp wgmma_gemm_sp tcgen05_gemm_sp", lambda f, o: f(o.A_half, o.E, o.S, o.F)),
    *_of("tma_gather4", lambda f, o: f(o.A, o.four, 0, [0, 1, 2, 3], barrier=o.barrier)),
    *_of("tma_scatter4", lambda f, o: f(o.four, o.A, 0, [0, 1, 2, 3])),
    *_of("clc_is_canceled clc_get_first_ctaid_x clc_get_first_ctaid_y clc_get_first_ctaid_z", lambda f, o: f(o.S[0, 0])),
    *_of("clc_try_cancel clc_try_cancel_multicast", lambda f, o: f(o.S[0, 0], o.barrier[0])),
]  # fmt: skip


class Operands:
    """What instructions are called with: a matrix in device memory, shared memory and a fragment, and a barrier."""

    def __init__(self, A, image, S, F):
        self.A, self.image, self.S, self.F = A, image, S, F

    @property
    def barrier(self):
        return language.alloc_barrier(64)

    @property
    def A_half(self):
        return language.alloc_shared((64, 32), "float16")

    @property
    def four(self):
        return language.alloc_shared((4, 64), "float16")

    @property
    def E(self):
        return language.alloc_shared((64, 8), "uint8")


def kernel(row: Row, T):
    """A kernel that does nothing but the row's call."""

    def emit(A, image, S, F):
        value = row.emit(T, Operands(A, image, S, F))
        if value is not None and not hasattr(value, "scope"):
            language.evaluate(value)

    @language.prim_func
    def refused(A: language.Tensor((64, 64), "float16"), image: language.Tensor((1, 8, 8, 64), "float16")):
        with language.Kernel(1, threads=64):
            S = language.alloc_shared((64, 64), "float16")
            F = language.alloc_fragment((64, 64), "float32")
            emit(A, image, S, F)

    return refused
