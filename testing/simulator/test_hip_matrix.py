"""Every matrix instruction multiplies, with each element in the lane where AMD says that it is.

LANES is what AMD's matrix instruction calculator prints (its layouts are linear in the bits of row, column and k), and, for
gfx950, what AMD's Composable Kernel tests on the hardware (test/mx_mfma_op/mx_mfma_op.hpp): for each bit of an index, the bit
of the lane (l) or of the element in a lane's registers (e) that it goes to.
"""

import numpy as np
import pytest
import torch

from tilelang_ext.simulator import CompileError, execute_hip

ROW16, ROW32 = "l0 l1 l2 l3", "l0 l1 l2 l3 l4"
D16, D32 = "e0 e1 l4 l5", "e0 e1 l5 e2 e3"  # of a row of D; its column is as ROW16 or ROW32

# name: row of A and column of B and D, k, row of D, types of A, B and D, architectures
LANES = {
    "mfma_f32_16x16x4f32": (ROW16, "l4 l5", D16, "f32 f32 f32", "gfx90a gfx942 gfx950"),
    "mfma_f32_32x32x2f32": (ROW32, "l5", D32, "f32 f32 f32", "gfx90a gfx942 gfx950"),
    "mfma_f32_16x16x16f16": (ROW16, "e0 e1 l4 l5", D16, "f16 f16 f32", "gfx90a gfx942 gfx950"),
    "mfma_f32_32x32x8f16": (ROW32, "e0 e1 l5", D32, "f16 f16 f32", "gfx90a gfx942 gfx950"),
    "mfma_f32_16x16x16bf16_1k": (ROW16, "e0 e1 l4 l5", D16, "bf16 bf16 f32", "gfx90a gfx942 gfx950"),
    "mfma_f32_32x32x8bf16_1k": (ROW32, "e0 e1 l5", D32, "bf16 bf16 f32", "gfx90a gfx942 gfx950"),
    "mfma_f64_16x16x4f64": (ROW16, "l4 l5", "l4 l5 e0 e1", "f64 f64 f64", "gfx90a gfx942 gfx950"),
    "mfma_i32_16x16x16i8": (ROW16, "e0 e1 l4 l5", D16, "i8 i8 i32", "gfx90a"),
    "mfma_i32_32x32x8i8": (ROW32, "e0 e1 l5", D32, "i8 i8 i32", "gfx90a"),
    "mfma_i32_16x16x32_i8": (ROW16, "e0 e1 e2 l4 l5", D16, "i8 i8 i32", "gfx942 gfx950"),
    "mfma_i32_32x32x16_i8": (ROW32, "e0 e1 e2 l5", D32, "i8 i8 i32", "gfx942 gfx950"),
    **{
        f"mfma_f32_16x16x32_{a}_{b}": (ROW16, "e0 e1 e2 l4 l5", D16, f"{a} {b} f32", "gfx942 gfx950")
        for a in ("fp8", "bf8")
        for b in ("fp8", "bf8")
    },
    **{
        f"mfma_f32_32x32x16_{a}_{b}": (ROW32, "e0 e1 e2 l5", D32, f"{a} {b} f32", "gfx942 gfx950")
        for a in ("fp8", "bf8")
        for b in ("fp8", "bf8")
    },
    "mfma_f32_16x16x32_f16": (ROW16, "e0 e1 e2 l4 l5", D16, "f16 f16 f32", "gfx950"),
    "mfma_f32_32x32x16_f16": (ROW32, "e0 e1 e2 l5", D32, "f16 f16 f32", "gfx950"),
    "mfma_f32_16x16x32_bf16": (ROW16, "e0 e1 e2 l4 l5", D16, "bf16 bf16 f32", "gfx950"),
    "mfma_f32_32x32x16_bf16": (ROW32, "e0 e1 e2 l5", D32, "bf16 bf16 f32", "gfx950"),
    "mfma_i32_16x16x64_i8": (ROW16, "e0 e1 e2 e3 l4 l5", D16, "i8 i8 i32", "gfx950"),
    "mfma_i32_32x32x32_i8": (ROW32, "e0 e1 e2 e3 l5", D32, "i8 i8 i32", "gfx950"),
    "wmma_f32_16x16x16_f16_w32": (ROW16, "e0 e1 e2 e3", "l4 e0 e1 e2", "f16 f16 f32", "gfx1100"),
    "wmma_f32_16x16x16_bf16_w32": (ROW16, "e0 e1 e2 e3", "l4 e0 e1 e2", "bf16 bf16 f32", "gfx1100"),
    "wmma_f32_16x16x16_f16_w32_gfx12": (ROW16, "e0 e1 l4 e2", "e0 e1 e2 l4", "f16 f16 f32", "gfx1201"),
    "wmma_f32_16x16x16_bf16_w32_gfx12": (ROW16, "e0 e1 l4 e2", "e0 e1 e2 l4", "bf16 bf16 f32", "gfx1201"),
    **{
        f"wmma_f32_16x16x16_{a}_{b}_w32_gfx12": (ROW16, "e0 e1 e2 l4", "e0 e1 e2 l4", f"{a} {b} f32", "gfx1201")
        for a in ("fp8", "bf8")
        for b in ("fp8", "bf8")
    },
}
# Scaled ones: k of an 8-bit operand, and of a 4-bit one.
SCALED = {
    "mfma_scale_f32_16x16x128_f8f6f4": (ROW16, {8: "e0 e1 e2 e3 l4 l5 e4", 4: "e0 e1 e2 e3 e4 l4 l5"}, D16),
    "mfma_scale_f32_32x32x64_f8f6f4": (ROW32, {8: "e0 e1 e2 e3 l5 e4", 4: "e0 e1 e2 e3 e4 l5"}, D32),
}
FORMATS = {"fp8": 0, "bf8": 1, "fp4": 4}
BITS = {"f32": 32, "f16": 16, "bf16": 16, "f64": 64, "i8": 8, "i32": 32, "fp8": 8, "bf8": 8, "fp4": 4}
VECTOR = {"f32": "float", "f16": "_Float16", "bf16": "short", "f64": "double", "i8": "signed char", "i32": "int"}
FP4_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
FNUZ = {"gfx942"}
BYTES = 128  # of a lane's registers of one matrix here, the most that any instruction has


def random_codes(kind, shape, arch, rng):
    """Codes, one an element, and their values in float64."""
    if kind in ("fp8", "bf8", "fp4"):
        codes = rng.integers(0, 16 if kind == "fp4" else 256, shape).astype(np.uint8)
        if kind == "fp4":
            return codes, np.array(FP4_VALUES)[codes]
        name = {"fp8": "float8_e4m3", "bf8": "float8_e5m2"}[kind]
        name += "fnuz" if arch in FNUZ else "fn" if kind == "fp8" else ""
        values = torch.from_numpy(codes).view(getattr(torch, name)).double().numpy()
        codes[~np.isfinite(values)] = 0
        return codes, np.where(np.isfinite(values), values, 0)
    if kind.startswith("i"):
        values = rng.integers(-128, 128, shape)
        return values.astype(np.int8 if kind == "i8" else np.int32), values.astype(np.float64)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}[kind]
    values = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    view = {16: torch.int16, 32: torch.int32, 64: torch.int64}[BITS[kind]]
    return values.view(view).numpy(), values.double().numpy()


def places(first, second, shape):
    """Lane and element of each index pair, from where the bits of both go."""
    lane, element = np.zeros(shape, int), np.zeros(shape, int)
    for axis, bits in enumerate((first, second)):
        index = np.arange(shape[axis]).reshape((-1, 1) if axis == 0 else (1, -1))
        for bit, target in enumerate(bits.split()):
            moved = (index >> bit & 1) << int(target[1:])
            if target[0] == "l":
                lane |= moved
            else:
                element |= moved
    return lane, element


def store(registers, lane, element, codes, bits):
    """Put codes into the registers (lanes, bytes)."""
    if bits == 4:
        np.bitwise_or.at(registers, (lane, element // 2), codes << (element % 2 * 4).astype(np.uint8))
    else:
        width = bits // 8
        for byte in range(width):
            registers[lane, element * width + byte] = codes.astype(np.int64) >> 8 * byte & 255


def load(registers, lane, element, kind):
    dtype = {"f32": np.float32, "f64": np.float64, "i32": np.int32}[kind]
    return registers.view(dtype)[lane, element].astype(np.float64)


class Case:
    """One instruction with random operands in their registers, and the product that it must give."""

    def __init__(self, name, arch, rng):
        self.wave = 64 if arch.startswith("gfx9") else 32
        if name in SCALED or name.partition(":")[0] in SCALED:
            self.name, _, pair = name.partition(":")
            row, k_of, d_row = SCALED[self.name]
            a_kind, b_kind = pair.split("*")
            k_a, k_b, self.out = k_of[BITS[a_kind]], k_of[BITS[b_kind]], "f32"
        else:
            self.name = name
            row, k_a, d_row, types, _ = LANES[name]
            k_b = k_a
            a_kind, b_kind, self.out = types.split()
        self.kinds = a_kind, b_kind
        rows, K = 1 << len(row.split()), 1 << len(k_a.split())
        a_codes, a = random_codes(a_kind, (rows, K), arch, rng)
        b_codes, b = random_codes(b_kind, (rows, K), arch, rng)
        c_codes, c = random_codes(self.out, (rows, rows), arch, rng)
        self.registers = np.zeros((3, self.wave, BYTES), np.uint8)
        for registers, codes, kind, k in zip(self.registers, (a_codes, b_codes), self.kinds, (k_a, k_b), strict=False):
            lane, element = places(row, k, (rows, K))
            store(registers, lane, element, codes, BITS[kind])
            if arch == "gfx1100":  # the upper half of a wave repeats the lower
                registers[16:] = registers[:16]
        self.d_places = places(d_row, row, (rows, rows))
        store(self.registers[2], *self.d_places, c_codes, BITS[self.out])
        self.scales = rng.integers(120, 135, (2, self.wave, 4)).astype(np.uint8)
        self.op_sel = rng.integers(0, 4, 2) if name != self.name else (0, 0)
        if name != self.name:
            for values, scale, op_sel in ((a, self.scales[0], self.op_sel[0]), (b, self.scales[1], self.op_sel[1])):
                exponents = scale[:, op_sel].reshape(K // 32, rows).T.astype(int) - 127
                values *= np.exp2(np.repeat(exponents, 32, axis=1))
        self.a, self.b, self.expected = a, b, a @ b.T + c
        self.bound = (np.abs(a) @ np.abs(b).T + np.abs(c)) * K * 2.0**-23 if self.out != "f64" else 1e-12

    def text(self, number):
        a, b = (f"typedef {v} __attribute__((vector_size({n}))) {x};" for x, v, n in self.vectors())
        out = VECTOR[self.out]
        c = f"typedef {out} __attribute__((vector_size({self.results()}))) VC;"
        extra = ""
        if self.name.startswith("mfma_scale"):
            (fa, fb), (sa, sb) = (FORMATS[k] for k in self.kinds), self.op_sel
            extra = f", {fa}, {fb}, {sa}, ((int*)S)[lane], {sb}, ((int*)S)[{self.wave} + lane]"
        elif self.name.startswith("mfma"):
            extra = ", 0, 0, 0"
        return (
            f"  if (blockIdx.x == {number}) {{ {a} {b} {c}\n"
            f"    *(VC*)D = __builtin_amdgcn_{self.name}(*(VA*)A, *(VB*)B, *(VC*)C{extra});\n  }}\n"
        )

    def vectors(self):
        for x, kind, values in zip(("VA", "VB"), self.kinds, (self.a, self.b), strict=True):
            groups = 16 if self.name.endswith("w32") else self.wave
            size = 32 if self.name.startswith("mfma_scale") else values.size // groups * BITS[kind] // 8
            yield x, VECTOR.get(kind, "long" if size == 8 and self.wave == 64 else "int"), size

    def results(self):
        return self.expected.size // self.wave * BITS[self.out] // 8


def source_of(cases):
    """A kernel whose group i runs instruction i on the registers that it is given."""
    wave = cases[0].wave
    body = "".join(case.text(i) for i, case in enumerate(cases))
    return (
        "#include <hip/hip_runtime.h>\n"
        'extern "C" __global__ void products(const char* registers, const char* scales, char* result) {\n'
        f"  const int lane = threadIdx.x, row = blockIdx.x * 3 * {wave} + lane;\n"
        f"  const char *A = registers + row * {BYTES}, *B = A + {wave * BYTES}, *C = B + {wave * BYTES};\n"
        f"  const char* S = scales + blockIdx.x * {wave * 8};\n"
        f"  char* D = result + (blockIdx.x * {wave} + lane) * {BYTES};\n{body}}}\n"
    )


def run(cases, arch):
    wave = cases[0].wave
    registers = np.stack([case.registers for case in cases])
    scales = np.stack([case.scales for case in cases])
    result = np.full((len(cases), wave, BYTES), 0xFF, np.uint8)
    arguments, shape = [registers, scales, result], {"grid": (len(cases), 1, 1), "threads": (wave, 1, 1)}
    report = execute_hip(source_of(cases), "products", arguments, arch=arch, **shape)
    return report, [load(d, *case.d_places, case.out) for case, d in zip(cases, result, strict=True)]


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_products(arch):
    rng = np.random.default_rng(0)
    names = [name for name, (*_, archs) in LANES.items() if arch in archs.split()]
    if arch == "gfx950":
        pairs = ("fp8*fp8", "fp8*bf8", "bf8*fp8", "fp8*fp4", "fp4*bf8", "fp4*fp4")
        names += [f"{name}:{pair}" for name in SCALED for pair in pairs]
    cases = [Case(name, arch, rng) for name in names]
    report, results = run(cases, arch)
    assert report.findings == ()
    for name, case, result in zip(names, cases, results, strict=True):
        error = np.abs(result - case.expected)
        assert (error <= case.bound).all(), (name, error.max())
    assert set(report.instructions) == {case.name for case in cases}
    assert sum(report.instructions.values()) == len(cases)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_instructions_that_the_architecture_lacks(arch):
    """Each is named in an error of its own."""
    rng = np.random.default_rng(0)
    foreign = [name for name, (*_, archs) in LANES.items() if arch not in archs.split()]
    none = np.zeros(1, np.uint8)
    for i in range(0, len(foreign), 10):  # a compiler stops at 20 errors
        cases = [Case(name, LANES[name][-1].split()[0], rng) for name in foreign[i : i + 10]]
        with pytest.raises(CompileError) as error:
            execute_hip(source_of(cases), "products", [none] * 3, arch=arch, grid=(1, 1, 1), threads=(64, 1, 1))
        for case in cases:
            assert f"this architecture lacks {case.name}, which is for " in str(error.value), case.name


def test_subnormal_operands_are_zero_on_gfx90a():
    rng = np.random.default_rng(0)
    for arch, flushed in (("gfx90a", True), ("gfx942", False)):
        case = Case("mfma_f32_16x16x16f16", arch, rng)
        case.registers[2] = 0
        case.registers[0].view(np.float16)[:] = 2.0**-20
        case.registers[1].view(np.float16)[:] = 1.0
        _, (result,) = run([case], arch)
        assert (result == (0 if flushed else 16 * 2.0**-20)).all(), arch


def test_upper_half_must_repeat_on_gfx1100():
    case = Case("wmma_f32_16x16x16_f16_w32", "gfx1100", np.random.default_rng(0))
    case.registers[0, 20, 5] ^= 1
    report, _ = run([case], "gfx1100")
    (finding,) = report.findings
    assert finding.kind == "operand"
    assert finding.thread == (20, 0, 0)


def test_ends_of_the_scale():
    """Code 0 is 2^-127, a subnormal float; with 2^127 the product is as with scales of 1."""
    results = []
    for codes in ((0, 254), (127, 127)):
        case = Case("mfma_scale_f32_16x16x128_f8f6f4:fp8*fp8", "gfx950", np.random.default_rng(0))
        case.registers[2] = 0
        case.scales[0], case.scales[1] = codes
        results += run([case], "gfx950")[1]
    assert np.array_equal(*results)
    assert np.abs(results[0]).min() > 0


def test_scale_of_nan():
    case = Case("mfma_scale_f32_16x16x128_f8f6f4:fp8*fp8", "gfx950", np.random.default_rng(0))
    case.scales[0, 3, case.op_sel[0]] = 255  # row 3, k below 32
    _, (result,) = run([case], "gfx950")
    assert np.isnan(result[3]).all()
    assert np.isfinite(np.delete(result, 3, axis=0)).all()


@pytest.mark.parametrize("cbsz", [2, 3])
def test_six_bit_operands_are_not_simulated(cbsz, monkeypatch):
    monkeypatch.setitem(FORMATS, "fp8", cbsz)
    report, _ = run([Case("mfma_scale_f32_16x16x128_f8f6f4:fp8*bf8", "gfx950", np.random.default_rng(0))], "gfx950")
    assert {f.kind for f in report.findings} == {"operand"}
