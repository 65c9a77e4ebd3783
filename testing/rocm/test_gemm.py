"""T.gemm on AMD: which instruction each architecture gets, what stays upstream's, lane maps and errors. Needs no compiler."""

import itertools
import re
from types import SimpleNamespace

import pytest
from rocm.kernels import ARCHS, FP8, attention_products, gemm, lower, scaled_matmul, shared_accumulator
from tilelang.rocm.op.gemm.gemm_mfma import GEMM_INST_MFMA, GemmMFMA
from tilelang.rocm.op.gemm.gemm_wmma import GEMM_INST_WMMA, GemmWMMA
from tilelang.rocm.target import target_is_hip
from tilelang.tileop.gemm.registry import register_gemm_impl

from tilelang_ext import formats
from tilelang_ext.rocm import layout
from tilelang_ext.rocm.backend import lowering_key, normalize_target, register
from tilelang_ext.rocm.instructions import MFMA, TILE, UNITS, WMMA_GFX11, WMMA_GFX12, select_product

E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ = FP8
TF32, FP4 = "custom[tfloat32]", "float4_e2m1fn"
BUILTIN = re.compile(r"__builtin_amdgcn_((?:mfma|wmma)\w+)\(")


def builtins(kernel, arch):
    return set(BUILTIN.findall(lower(kernel, arch).source))


# What multiplies A and B at K = 128. Only a type that the unit reads as it is meant goes in as codes.
EXPECTED = {
    ("gfx90a", E4M3, E4M3): "mfma_f32_16x16x16bf16_1k",
    ("gfx90a", E5M2, E4M3_FNUZ): "mfma_f32_16x16x16bf16_1k",
    ("gfx942", E4M3, E4M3): "mfma_f32_16x16x16f16",
    ("gfx942", E5M2, E5M2): "mfma_f32_16x16x16f16",
    ("gfx942", E4M3, E4M3_FNUZ): "mfma_f32_16x16x16f16",
    ("gfx942", E4M3_FNUZ, E4M3_FNUZ): "mfma_f32_16x16x32_fp8_fp8",
    ("gfx942", E4M3_FNUZ, E5M2_FNUZ): "mfma_f32_16x16x32_bf8_fp8",  # called with A and B exchanged
    ("gfx942", E5M2_FNUZ, E4M3_FNUZ): "mfma_f32_16x16x32_fp8_bf8",
    ("gfx950", E4M3, E4M3): "mfma_scale_f32_16x16x128_f8f6f4",
    ("gfx950", E4M3, E5M2): "mfma_scale_f32_16x16x128_f8f6f4",
    ("gfx950", E4M3_FNUZ, E4M3_FNUZ): "mfma_f32_16x16x32_f16",
    ("gfx950", "float16", "float16"): "mfma_f32_16x16x32_f16",
    ("gfx950", "bfloat16", "bfloat16"): "mfma_f32_16x16x32_bf16",
    ("gfx1100", E4M3, E5M2): "wmma_f32_16x16x16_f16_w32",
    ("gfx1201", E4M3, E4M3): "wmma_f32_16x16x16_fp8_fp8_w32_gfx12",
    ("gfx1201", E5M2, E4M3): "wmma_f32_16x16x16_bf8_fp8_w32_gfx12",
    ("gfx1201", E5M2_FNUZ, E4M3): "wmma_f32_16x16x16_f16_w32_gfx12",
}


@pytest.mark.parametrize(("arch", "a", "b"), EXPECTED)
def test_instruction(arch, a, b):
    assert builtins(gemm(a, b), arch) == {EXPECTED[arch, a, b]}


def test_a_type_is_never_read_in_another_flavour():
    """Over every pair of types on every architecture: codes go in as they are only where the unit means the same by them."""
    flavour = {"gfx942": (E4M3_FNUZ, E5M2_FNUZ), "gfx950": (E4M3, E5M2), "gfx1200": (E4M3, E5M2), "gfx1201": (E4M3, E5M2)}
    for arch, a, b, K in itertools.product(UNITS, FP8, FP8, (16, 32, 96, 128)):
        product = select_product(arch, a, b, K)
        if product.register is None:
            assert {a, b} <= set(flavour.get(arch, ()))
        else:
            assert product.register == ("bfloat16" if arch == "gfx90a" else "float16")
        assert K % product.instruction.K == 0


@pytest.mark.parametrize(
    ("K", "builtin"), [(32, "mfma_f32_16x16x32_fp8_fp8"), (96, "mfma_f32_16x16x32_fp8_fp8"), (16, "mfma_f32_16x16x16f16")]
)
def test_the_largest_instruction_that_divides_k(K, builtin):
    assert builtins(gemm(E4M3, E4M3, K=K), "gfx950") == {builtin}


def test_formats_of_the_mixed_instruction():
    """The f8f6f4 instruction is told its formats: first B's, since the operands are exchanged; 0 is E4M3, 1 is E5M2."""
    text = lower(gemm(E4M3, E5M2), "gfx950").source
    assert "f8f6f4(B, A, D, 1, 0, 0, 0x7f7f7f7f, 0, 0x7f7f7f7f)" in text


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_products_share_an_accumulator(arch):
    """The layout of an fp8 product's accumulator is that of tilelang's half product."""
    assert len(builtins(shared_accumulator(), arch)) == (2 if arch in ("gfx950", "gfx1201") else 1)


@pytest.mark.parametrize(
    ("dtype", "arch"), [(E4M3, "gfx90a"), (E4M3_FNUZ, "gfx942"), (E4M3, "gfx950"), ("float16", "gfx950"), (E4M3_FNUZ, "gfx950")]
)
def test_result_of_a_product_is_operand_of_the_next(arch, dtype):
    """Registers of one product's result, cast, are registers of the next one's A: no trip through shared memory."""
    text = lower(attention_products(dtype), arch).source
    assert text.count("__syncthreads") == 1


@pytest.fixture
def upstream():
    """A function that lowers with upstream's GEMM implementations alone."""

    def lower_upstream(kernel, arch):
        register_gemm_impl(GEMM_INST_MFMA, GEMM_INST_MFMA, target_is_hip, GemmMFMA)
        register_gemm_impl(GEMM_INST_WMMA, GEMM_INST_WMMA, target_is_hip, GemmWMMA)
        try:
            return lower.__wrapped__(kernel, arch).source
        finally:
            register()

    yield lower_upstream
    register()


@pytest.mark.parametrize("arch", ARCHS)
def test_other_products_stay_upstreams(arch, upstream):
    kernels = [gemm("float16", "float16"), gemm("bfloat16", "bfloat16", trans_B=False), gemm("float16", "float16", K=16)]
    if arch == "gfx950":  # 16-bit products with K a multiple of 32 are ours
        kernels = [gemm("float16", "float16", K=48), gemm("float32", "float32", K=32)]
    elif UNITS[arch].half[0]["float16"].accumulator is MFMA:
        kernels += [gemm("float32", "float32", K=32)]
        kernels += [gemm("int8", "int8", accum="int32")] if arch != "gfx90a" else []
    for kernel in kernels:
        text = lower(kernel, arch).source
        assert "tilelang_ext" not in text
        assert text == upstream(kernel, arch)


def test_upstream_is_another(upstream):
    """The fixture does switch: upstream gives OCP codes to the FNUZ unit of gfx942."""
    assert "mfma_f32_16x16x32_fp8_fp8" in upstream(gemm(E4M3, E4M3), "gfx942")
    assert builtins(gemm(E4M3, E4M3), "gfx942") == {"mfma_f32_16x16x16f16"}


@pytest.mark.parametrize("place", [MFMA, WMMA_GFX11, WMMA_GFX12])
def test_accumulator_places_are_inverse(place):
    cells = {(place.row(lane, e), place.col(lane, e)) for lane in range(place.wave) for e in range(place.elements)}
    assert cells == set(itertools.product(range(TILE), range(TILE)))
    for lane in range(place.wave):
        for e in range(place.elements):
            i, j = place.row(lane, e), place.col(lane, e)
            assert (place.lane(i, j), place.element(i, j)) == (lane, e)


@pytest.fixture
def places(monkeypatch):
    """A function giving {(thread, register): elements} of a layout, from the function that the layout is made of."""
    monkeypatch.setattr(layout, "Fragment", lambda shape, forward_fn, replicate=1: (shape, forward_fn, replicate))

    def places_of(made):
        shape, forward, replicas = made
        found = {}
        for i, j, replica in itertools.product(range(shape[0]), range(shape[1]), range(replicas)):
            place = forward(i, j, SimpleNamespace(var=replica)) if replicas > 1 else forward(i, j)
            found.setdefault(place, []).append((i, j))
        return found

    return places_of


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1100", "gfx1201"])
@pytest.mark.parametrize(("operand", "k_is_first"), [("A", False), ("A", True), ("B", False), ("B", True)])
def test_operand_layouts_hold_every_element(arch, operand, k_is_first, places):
    """Each (thread, register) has one element, and the lanes of an element are those that the instruction pairs."""
    instruction = select_product(arch, E4M3, E4M3, 128).instruction
    extent, K, partition = 32, 128, layout.Partition(2, 1)
    run = MFMA.elements if instruction.accumulator is MFMA else instruction.elements
    shape = (K, extent) if k_is_first else (extent, K)
    found = places(layout.operand_layout(shape, partition, instruction, run, operand, k_is_first))
    wave = instruction.accumulator.wave
    sharers = partition.cols if operand == "A" else partition.rows
    replicas = sharers * wave // (TILE * instruction.groups)
    assert all(len(cells) == 1 for cells in found.values())
    assert len(found) == extent * K * replicas
    for (thread, _), ((first, second),) in found.items():
        i, k = (second, first) if k_is_first else (first, second)
        assert thread % TILE == i % TILE
        assert thread % wave // TILE % instruction.groups == k // run % instruction.groups
        if operand == "A":
            assert thread // wave == i // (extent // partition.rows)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "gfx1201"])
def test_accumulator_layout_splits_the_tile_over_waves(arch, places):
    instruction = select_product(arch, E4M3, E4M3, 128).instruction
    found = places(layout.accumulator_layout((64, 32), layout.Partition(2, 1), instruction))
    assert len(found) == 64 * 32
    for (thread, _), ((i, _),) in found.items():
        assert thread // instruction.accumulator.wave == i // 32


@pytest.mark.parametrize(
    ("kernel", "arch", "error", "message"),
    [
        (
            lambda: gemm(E4M3, E4M3, accum="int32"),
            "gfx942",
            TypeError,
            "C of an fp8 product must be a whole float32 fragment",
        ),
        (lambda: gemm(E4M3, "float16"), "gfx942", TypeError, "both operands must be fp8 types; got float8_e4m3fn and float16"),
        (lambda: gemm(E4M3, E4M3, K=24), "gfx942", ValueError, "K of fp8 tiles must be a multiple of 16; got 24"),
        (lambda: gemm(E4M3, E4M3, M=40), "gfx942", ValueError, "M must be a multiple of 16; got M = 40"),
        (
            lambda: gemm(E4M3, E4M3, M=16, N=48, threads=256),
            "gfx942",
            ValueError,
            "must split into 16x16 blocks over all waves; got a 16x48 tile and 4 waves",
        ),
        (lambda: gemm(E4M3, E4M3, threads=96), "gfx942", ValueError, "must be a multiple of 64, .*; got 96; use threads=64"),
        (lambda: gemm(E4M3, E4M3), "gfx908", NotImplementedError, "fp8 operands are for gfx90a, .*; got gfx908"),
        (
            lambda: gemm("int8", "int8", accum="int32"),
            "gfx90a",
            NotImplementedError,
            "int8 operands need an instruction with K = 32, .*; got gfx90a, which has K = 16 alone; convert",
        ),
        *(
            (lambda sizes=sizes: gemm("float16", "float16", **sizes), arch, error, message)
            for arch in ("gfx942", "gfx1100")
            for sizes, error, message in (
                ({"M": 40}, ValueError, "M must be a multiple of 16; got M = 40"),
                ({"N": 104}, ValueError, "N must be a multiple of 16; got N = 104"),
                ({"M": 16, "N": 48, "threads": 256}, ValueError, "must split into 16x16 blocks over all waves"),
                ({"K": 24}, NotImplementedError, f"what instructions of {arch} multiply; .* K = 24 .*a multiple of 16"),
                ({"K": 8, "A_scope": "fragment"}, NotImplementedError, f"instructions of {arch} multiply; .* K = 8 into"),
            )
        ),
        (lambda: gemm("float16", "float16", threads=32), "gfx942", ValueError, "must be a multiple of 64, .*; got 32"),
        (
            lambda: gemm(TF32, TF32),
            "gfx942",
            NotImplementedError,
            "instructions of gfx942 multiply; got .*tfloat32",
        ),
        (
            lambda: gemm(FP4, FP4),
            "gfx950",
            TypeError,
            "target hip has no type for it; got float4_e2m1fn",
        ),
        (lambda: gemm("int8", "int8", accum="int32"), "gfx1100", NotImplementedError, "got int8 and int8 with K = 128"),
    ],
)
def test_errors(kernel, arch, error, message):
    with pytest.raises(error, match=message):
        lower(kernel(), arch)


@pytest.mark.parametrize(
    ("arch", "a", "b", "decoded"),
    [
        ("gfx90a", E4M3, E4M3, "bfloat16"),
        ("gfx942", E4M3, E4M3, "float16"),
        ("gfx942", E4M3_FNUZ, E5M2, "float16"),
        ("gfx950", E5M2_FNUZ, E5M2_FNUZ, "float16"),
        ("gfx1100", E4M3, E5M2, "float16"),
        ("gfx1201", E4M3_FNUZ, E4M3_FNUZ, "float16"),
    ],
)
def test_a_native_product_is_refused_where_it_would_be_decoded(arch, a, b, decoded):
    message = (
        rf"T\.gemm: require_native_fp8 needs an instruction for {a} and {b}; got {arch}, where they are decoded to {decoded};"
    )
    with pytest.raises(NotImplementedError, match=message):
        lower(scaled_matmul("row", a=a, b=b, K=256, require_native=True), arch)


@pytest.mark.parametrize(
    ("arch", "a", "b", "builtin"),
    [
        ("gfx942", E4M3_FNUZ, E5M2_FNUZ, "mfma_f32_16x16x32_bf8_fp8"),
        ("gfx950", E4M3, E4M3, "mfma_scale_f32_16x16x128_f8f6f4"),
        ("gfx1201", E4M3, E4M3, "wmma_f32_16x16x16_fp8_fp8_w32_gfx12"),
    ],
)
def test_a_native_product_is_what_it_was(arch, a, b, builtin):
    assert builtins(scaled_matmul("row", a=a, b=b, K=256, require_native=True), arch) == {builtin}


def test_a_kernel_cached_by_upstream_is_not_taken_for_ours():
    target = normalize_target({"kind": "hip", "mcpu": "gfx942"})
    assert lowering_key() in target.keys
    assert normalize_target(target).keys == target.keys
    assert normalize_target("cuda") is None
    assert normalize_target({"kind": "cuda"}) is None


def test_native_types_are_of_the_table():
    """What a unit takes as codes is OCP or FNUZ, never a mixture."""
    for unit in UNITS.values():
        assert {formats.format_of(dtype) in formats.OCP_OF_FNUZ for dtype in unit.native} in (set(), {True}, {False})
