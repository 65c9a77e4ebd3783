"""Macros that fill the tile C[k] of the output, each by one name of the language, from the tiles A and B.

Each function takes the language, or what else differs and returns such a function.
"""

from tvm import tirx
from tvm.ir import Op

SIZE = 32  # rows and columns of a tile
_PIXELS = SIZE * SIZE


def through(allocate):
    """A is copied to memory that `allocate(T)` returns, and from there to C."""

    def build(T):
        @T.macro
        def run(A, B, C, k):
            tile = allocate(T)
            T.copy(A, tile)
            T.copy(tile, C[k, :, :])

        return run

    return build


def loop(name):
    """C = A + B, in a loop by name over the rows."""

    def build(T):
        loop = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            for i in loop(SIZE):
                for j in T.Parallel(SIZE):
                    C[k, i, j] = T.cast(A[i, j], "float32") + T.cast(B[i, j], "float32")

        return run

    return build


def whole(name):
    """C = A + B, in a loop by name over all elements."""

    def build(T):
        loop = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            for i, q in loop(SIZE, 2):
                for j in T.Parallel(SIZE // 2):
                    C[k, i, 16 * q + j] = T.cast(A[i, 16 * q + j], "float32") + T.cast(B[i, 16 * q + j], "float32")

        return run

    return build


def reduction(name, dtype="float32", **options):
    """C[k, i, j] is the reduction of row i of A."""

    def build(T):
        reduce = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            tile = T.alloc_fragment((SIZE, SIZE), dtype)
            line = T.alloc_fragment((SIZE,), dtype)
            T.copy(A, tile)
            reduce(tile, line, dim=1, **options)
            for i, j in T.Parallel(SIZE, SIZE):
                C[k, i, j] = line[i]

        return run

    return build


def scan(name):
    def build(T):
        scan = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            tile = T.alloc_shared((SIZE, SIZE), "float32")
            sums = T.alloc_shared((SIZE, SIZE), "float32")
            T.copy(A, tile)
            scan(tile, sums, dim=1)
            T.copy(sums, C[k, :, :])

        return run

    return build


def atomic(name):
    """C holds B, and takes A by an atomic operation."""

    def build(T):
        atomic = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            for i, j in T.Parallel(SIZE, SIZE):
                atomic(C[k, i, j], T.cast(A[i, j], "float32"))

        return run

    return build


def gemm(T):
    @T.macro
    def run(A, B, C, k):
        left = T.alloc_shared((SIZE, SIZE), "float16")
        right = T.alloc_shared((SIZE, SIZE), "float16")
        total = T.alloc_fragment((SIZE, SIZE), "float32")
        T.copy(A, left)
        T.copy(B, right)
        T.clear(total)
        T.gemm(left, right, total)
        T.copy(total, C[k, :, :])

    return run


def transpose(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "float16")
        turned = T.alloc_shared((SIZE, SIZE), "float16")
        T.copy(A, tile)
        T.transpose(tile, turned)
        T.copy(turned, C[k, :, :])

    return run


def fill(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_fragment((SIZE, SIZE), "float32")
        T.fill(tile, 2.5)
        T.copy(tile, C[k, :, :])

    return run


def var(T):
    @T.macro
    def run(A, B, C, k):
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(A[i, j], "float32")
        sum = T.alloc_var("int32", init=3)
        for q in T.serial(4):
            sum = sum + q
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = C[k, i, j] + T.cast(sum, "float32")

    return run


def local(T):
    @T.macro
    def run(A, B, C, k):
        line = T.alloc_local((4,), "float32")
        for q in T.serial(4):
            line[q] = T.cast(q, "float32")
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(A[i, j], "float32") + line[3]

    return run


def async_copy(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "float16")
        T.async_copy(A, tile)
        T.ptx_wait_group(0)
        T.sync_threads()
        T.copy(tile, C[k, :, :])

    return run


def view(name, **options):
    def build(T):
        @T.macro
        def run(A, B, C, k):
            tile = T.alloc_shared((SIZE, SIZE), "float16")
            T.copy(A, tile)
            flat = getattr(T, name)(tile, (_PIXELS,))
            for i, j in T.Parallel(SIZE, SIZE):
                C[k, i, j] = T.cast(flat[j * SIZE + i], "float32")

        return run

    return build


def pipelined(T):
    @T.macro
    def run(A, B, C, k):
        total = T.alloc_fragment((SIZE,), "float32")
        line = T.alloc_shared((SIZE,), "float16")
        T.clear(total)
        for i in T.Pipelined(SIZE, num_stages=2):
            T.copy(A[i, 0:SIZE], line)
            for j in T.Parallel(SIZE):
                total[j] = total[j] + T.cast(line[j], "float32")
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = total[j]

    return run


def hint(name, call):
    """Statements about the kernel that change nothing that it computes."""

    def build(T):
        hint = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            call(hint, A)
            T.copy(A, C[k, :, :])

        return run

    return build


def test(name):
    """Whether any or all elements of a row of conditions hold."""

    def build(T):
        test = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            flags = T.alloc_shared((SIZE,), "bool")
            for j in T.Parallel(SIZE):
                flags[j] = A[0, j] > T.float16(0)
            if test(flags):
                T.fill(C[k, :, :], 1)
            else:
                T.fill(C[k, :, :], 2)

        return run

    return build


def leave(T):
    @T.macro
    def run(A, B, C, k):
        T.copy(A, C[k, :, :])
        for q in T.serial(8):
            if q == 3:
                T.loop_break()
            for i, j in T.Parallel(SIZE, SIZE):
                C[k, i, j] = C[k, i, j] + 1.0

    return run


def extent(name, *arguments):
    """C is a number of the launch."""

    def build(T):
        number = getattr(T, name)(*arguments)
        if isinstance(number, (list, tuple)):
            number = number[0]

        @T.macro
        def run(A, B, C, k):
            T.fill(C[k, :, :], T.cast(number, "float32"))

        return run

    return build


def reducer(T):
    @T.macro
    def run(A, B, C, k):
        total = T.alloc_reducer((SIZE,), "float32", op="sum")
        line = T.alloc_fragment((SIZE,), "float32")
        T.reducer_init(total)
        for i, j in T.Parallel(SIZE, SIZE):
            T.reducer_update(total[i], T.cast(A[i, j], "float32"))
        T.finalize_reducer(total, line)
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = line[i]

    return run


def persistent(T):
    @T.macro
    def run(A, B, C, k):
        for by, bx in T.Persistent([4, 4], 1, 0):
            for i, j in T.Parallel(8, 8):
                C[k, by * 8 + i, bx * 8 + j] = T.cast(A[by * 8 + i, bx * 8 + j], "float32")

    return run


def vector(name):
    def build(T):
        loop = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            for i, q in T.Parallel(SIZE, SIZE // 4):
                for j in loop(4):
                    C[k, i, q * 4 + j] = T.cast(A[i, q * 4 + j], "float32") + T.cast(B[i, q * 4 + j], "float32")

        return run

    return build


def pair(name, width):
    """C holds B, and takes two or four elements of A at once."""

    def build(T):
        atomic = getattr(T, name)

        @T.macro
        def run(A, B, C, k):
            tile = T.alloc_shared((SIZE, SIZE), "float32")
            T.copy(A, tile)
            for i, j in T.Parallel(SIZE, SIZE // width):
                atomic(C[k, i, j * width], tile[i, j * width])

        return run

    return build


def atomic_store(T):
    @T.macro
    def run(A, B, C, k):
        for i, j in T.Parallel(SIZE, SIZE):
            T.atomic_store(C[k, i, j], T.cast(A[i, j], "float32"), memory_order="relaxed")

    return run


def atomic_load(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "int32")
        T.copy(A, tile)
        T.sync_threads()
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(T.atomic_load(tile[i, j], memory_order="relaxed"), "float32")

    return run


def atomic_or(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "int32")
        T.copy(A, tile)
        T.sync_threads()
        for i, j in T.Parallel(SIZE, SIZE):
            T.atomic_or(tile[i, j], T.cast(B[i, j], "int32"))
        T.sync_threads()
        T.copy(tile, C[k, :, :])

    return run


def coordinates(T):
    @T.macro
    def run(A, B, C, k):
        for q in T.Parallel(_PIXELS):
            place = T.index_to_coordinates(q, (SIZE, SIZE))
            C[k, place[1], place[0]] = T.cast(A[place[0], place[1]], "float32")

    return run


def skip(T):
    @T.macro
    def run(A, B, C, k):
        T.copy(A, C[k, :, :])
        for q in T.serial(8):
            if q % 2 == 0:
                T.evaluate(T.continue_loop())
            for i, j in T.Parallel(SIZE, SIZE):
                C[k, i, j] = C[k, i, j] + 1.0

    return run


def break_loop(T):
    @T.macro
    def run(A, B, C, k):
        T.copy(A, C[k, :, :])
        for q in T.serial(8):
            if q == 3:
                T.evaluate(T.break_loop())
            for i, j in T.Parallel(SIZE, SIZE):
                C[k, i, j] = C[k, i, j] + 1.0

    return run


def layout(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "float16")
        T.annotate_layout({tile: T.Layout((SIZE, SIZE), lambda i, j: (i, (j + i) % SIZE))})
        T.copy(A, tile)
        T.copy(tile, C[k, :, :])

    return run


def safe_value(T):
    @T.macro
    def run(A, B, C, k):
        T.annotate_safe_value({A: 7.0})
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(A[i + 16, j], "float32")

    return run


def scratch(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_global((SIZE, SIZE), "float32")
        T.copy(A, tile)
        T.sync_threads()
        T.copy(tile, C[k, :, :])

    return run


def ldg(T):
    @T.macro
    def run(A, B, C, k):
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(getattr(T, "__ldg")(A[i, j]), "float32")

    return run


def pointer(name):
    """C holds B, and takes A by an atomic on a pointer that the function of that name gives."""

    def build(T):
        function = getattr(T, name)
        arguments = {
            "access_ptr": lambda C, k, i, j: (C[k, i, j], "rw"),
            "address_of": lambda C, k, i, j: (C[k, i, j],),
            "tvm_access_ptr": lambda C, k, i, j: (
                T.type_annotation("float32"), C.data, (k * SIZE + i) * SIZE + j, 1, 3
            ),
        }[name]  # fmt: skip

        @T.macro
        def run(A, B, C, k):
            for i, j in T.Parallel(SIZE, SIZE):
                tirx.call_intrin(
                    "handle", Op.get("tl.atomic_add_elem_op"), function(*arguments(C, k, i, j)), T.cast(A[i, j], "float32")
                )

        return run

    return build


def at_address(T):
    @T.macro
    def run(A, B, C, k):
        line = T.make_tensor_from_addr(T.address_of(A[0, 0]), (_PIXELS,), "float16")
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(line[i * SIZE + j], "float32")

    return run


def past_address(T):
    """C is A from its second row on, and in its last row the first of B."""

    @T.macro
    def run(A, B, C, k):
        line = T.make_tensor_from_addr(T.handle_add_byte_offset(A.data, 2 * SIZE), (_PIXELS - SIZE,), "float16")
        for i, j in T.Parallel(SIZE, SIZE):
            if i < SIZE - 1:
                C[k, i, j] = T.cast(line[i * SIZE + j], "float32")
            else:
                C[k, i, j] = T.cast(B[0, j], "float32")

    return run


def printed(T):
    @T.macro
    def run(A, B, C, k):
        if T.get_thread_binding() == 0:
            T.print(A[0, 0], msg="the first element")
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(A[i, j], "float32")

    return run


def dot_of_four(T):
    """Each element of C is the product of the first four elements of the first rows."""

    @T.macro
    def run(A, B, C, k):
        a = T.alloc_local((4,), "int8")
        b = T.alloc_local((4,), "int8")
        total = T.alloc_local((1,), "int32")
        total[0] = 0
        for v in T.serial(4):
            a[v] = T.cast(A[0, v], "int8")
            b[v] = T.cast(B[0, v], "int8")
        T.dp4a(a[0], b[0], total[0])
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = T.cast(total[0], "float32")

    return run


def asynchronous(T):
    @T.macro
    def run(A, B, C, k):
        tile = T.alloc_shared((SIZE, SIZE), "float16")
        for i, j in T.Parallel(SIZE, SIZE // 8):
            T.ptx_cp_async(T.access_ptr(tile[i, j * 8], "w", 8), T.access_ptr(A[i, j * 8], "r", 8), 8)
        T.ptx_commit_group()
        T.ptx_wait_group(0)
        T.copy(tile, C[k, :, :])

    return run


def all_reduced(T):
    """Each element of C is the sum of a value of each of 64 threads: the first row of A, twice."""

    @T.macro
    def run(A, B, C, k):
        total = T.alloc_local((1,), "float32")
        value = T.cast(A[0, T.get_thread_binding() % SIZE], "float32")
        with T.attr(T.comm_reducer(lambda x, y: x + y, [T.float32(0)]), "reduce_scope", T.reinterpret(T.uint64(0), "handle")):
            T.tvm_thread_allreduce(T.uint32(1), value, True, total[0], T.get_thread_binding())
        for i, j in T.Parallel(SIZE, SIZE):
            C[k, i, j] = total[0]

    return run


def blockscaled(T):
    """C = A B, each row times 1/2, 1 or 2: one group of 32 along K, with scales in E8M0."""

    @T.macro
    def run(A, B, C, k):
        left = T.alloc_shared((SIZE, SIZE), "float8_e4m3fn")
        right = T.alloc_shared((SIZE, SIZE), "float8_e4m3fn")
        left_scale = T.alloc_shared((SIZE, 1), "uint8")
        right_scale = T.alloc_shared((SIZE, 1), "uint8")
        total = T.alloc_fragment((SIZE, SIZE), "float32")
        T.copy(A, left)
        T.copy(B, right)
        for i in T.Parallel(SIZE):
            left_scale[i, 0] = T.cast(126 + i % 3, "uint8")
            right_scale[i, 0] = T.uint8(127)
        T.clear(total)
        T.mma_gemm_blockscaled(
            left, right, total, left_scale, right_scale, k_start=0, sf_a_granularity_k=SIZE, sf_b_granularity_k=SIZE
        )
        T.copy(total, C[k, :, :])

    return run


def early_return(T):
    """Each of 32 threads copies a column of A; the others have ended."""

    @T.macro
    def run(A, B, C, k):
        if T.get_thread_binding() >= SIZE:
            T.thread_return()
        for i in T.serial(SIZE):
            C[k, i, T.get_thread_binding()] = T.cast(A[i, T.get_thread_binding()], "float32")

    return run
