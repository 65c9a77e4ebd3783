"""HIP: what lanes of a wave, and threads of a group, tell each other."""

import numpy as np
import pytest
import torch
from simulator.hip_texts import HEADER, run

WAVES = {"gfx942": 64, "gfx1100": 32}
lane_of = {wave: np.arange(128) % wave for wave in WAVES.values()}


def results(statements, arch, count):
    """Each statement assigns to r[i] of every thread of a group of 128; findings and an array (count, 128)."""
    source = HEADER + (
        'extern "C" __global__ void f(int* out) {\n'
        "  const int t = threadIdx.x, lane = __lane_id(), value = t * 7 % 31;\n"
        f"  int r[{count}] = {{}};\n{statements}\n  for (int i = 0; i < {count}; ++i) out[i * 128 + t] = r[i];\n}}\n"
    )
    out = torch.full((count, 128), -1, dtype=torch.int32)
    report = run(source, "f", [out], arch=arch, threads=128)
    return report, out.numpy()


@pytest.mark.parametrize("arch", WAVES)
def test_shuffles(arch):
    wave = WAVES[arch]
    report, r = results(
        """
  r[0] = lane;
  r[1] = __shfl(value, 5);
  r[2] = __shfl(value, lane + 1, 16);
  r[3] = __shfl_up(value, 3);
  r[4] = __shfl_up(value, 3, 8);
  r[5] = __shfl_down(value, 20);
  r[6] = __shfl_down(value, 2, 8);
  r[7] = __shfl_xor(value, 17);
  r[8] = __shfl_xor(value, 8, 8);
  r[9] = __builtin_amdgcn_readfirstlane(value);
  r[10] = __builtin_amdgcn_readlane(value, 9);
  r[11] = __builtin_amdgcn_ds_bpermute(4 * (lane ^ 3), value);
  r[12] = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
  r[13] = int(4 * tl::shfl_xor(half_t(0.25f * lane), 1));
  r[14] = int(__shfl_xor(double(value), 2));
""",
        arch,
        15,
    )
    assert report.findings == ()
    t, lane = np.arange(128), lane_of[wave]
    value, base = t * 7 % 31, t - lane_of[wave]

    def of(source):
        return value[base + source]

    expected = [
        lane,
        of(5),
        of(lane // 16 * 16 + (lane + 1) % 16),
        of(np.where(lane < 3, lane, lane - 3)),
        of(np.where(lane % 8 < 3, lane, lane - 3)),
        of(np.where(lane + 20 >= wave, lane, np.minimum(lane + 20, wave - 1))),
        of(np.where(lane % 8 + 2 >= 8, lane, np.minimum(lane + 2, wave - 1))),
        of(lane ^ 17),
        of(np.where(lane % 16 < 8, lane, lane - 8)),  # HIP guards the upper end of a lane's part alone
        of(0),
        of(9),
        of(lane ^ 3),
        lane,
        lane ^ 1,
        of(lane ^ 2),
    ]
    for i, (got, wanted) in enumerate(zip(r, expected, strict=True)):
        assert np.array_equal(got, np.broadcast_to(wanted, 128)), i


@pytest.mark.parametrize("arch", WAVES)
def test_votes(arch):
    wave = WAVES[arch]
    report, r = results(
        """
  const unsigned long votes = __ballot(value < 10);
  r[0] = votes, r[1] = votes >> 32;
  r[2] = __any(t == 70), r[3] = __all(t != 70);
  r[4] = __syncthreads_count(value < 10);
  r[5] = __syncthreads_and(t != 70), r[6] = __syncthreads_or(t == 70), r[7] = __syncthreads_or(t == 128);
  r[8] = __popcll(votes), r[9] = __ffs(value), r[10] = __clz(value), r[11] = __brev(value);
  r[12] = tl_dp4a(0x80ff7f01, 0x02030405, -3);
""",
        arch,
        13,
    )
    assert report.findings == ()
    t = np.arange(128)
    value, first = t * 7 % 31, t - lane_of[wave]
    bits = np.array([sum(1 << k for k in range(wave) if (f + k) * 7 % 31 < 10) for f in first], np.uint64)
    holds_70 = (first <= 70) & (first + wave > 70)
    expected = [
        (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32),
        (bits >> np.uint64(32)).astype(np.uint32).view(np.int32),
        holds_70,
        ~holds_70,
        (value < 10).sum(),
        0,
        1,
        0,
        [int(b).bit_count() for b in bits],
        [(int(v) & -int(v)).bit_length() for v in value],
        [32 - int(v).bit_length() for v in value],
        np.array([int(f"{v:032b}"[::-1], 2) for v in value], np.uint32).view(np.int32),
        -128 * 2 - 3 + 127 * 4 + 5 - 3,
    ]
    for i, (got, wanted) in enumerate(zip(r, expected, strict=True)):
        assert np.array_equal(got, np.broadcast_to(np.asarray(wanted, np.int32), 128)), i


def test_functions_and_atomics():
    """Bits, math and atomics of one thread, or of all on one word; a word that already holds more, or less, keeps it."""
    expected = {
        "__popc(0xf0f1u)": 9, "__clzll(1)": 63, "__clzll(0)": 64, "__ffsll(4ll << 32)": 35, "__clz(0)": 32,
        "__float_as_int(-2.0f)": -(1 << 30), "int(__int_as_float(0x40400000))": 3, "int(__uint_as_float(0x40a00000u))": 5,
        "__float_as_uint(2.0f)": 1 << 30, "int(__hiloint2double(0x40080000, 0) * 2)": 6,
        "int(16 * __fdividef(3.0f, 4.0f))": 12, "int(__powf(2.0f, 5.0f))": 32, "int(16 * __frcp_rn(8.0f))": 2,
        "int(8 * __frsqrt_rn(16.0f))": 2, "int(16 * rsqrtf(4.0f))": 8, "int(16 * hrsqrt(_Float16(16)))": 4,
        "int(__ocml_pown_f16(_Float16(3), 2))": 9, "int(__ocml_sqrt_f16(_Float16(9)))": 3, "int(ldexpf(3.0f, 4))": 48,
        "int(fmaf(2.0f, 3.0f, 4.0f))": 10, "int(fmin(2.0f, 3.0f) + 10 * fmax(2.0f, 3.0f))": 32,
        "int(1000 * expm1f(1.0f))": 1718, "int(4096 * __half2float(__float2half(0.1f)))": 409,
        "int(8 * float(hip_bfloat16(1.625f) * hip_bfloat16(3.0f)))": 39, "int(float(hip_bfloat16(257.0f)))": 256,
        "int(float(-hip_bfloat16(259.0f)))": -260, "int(float(hip_bfloat16(6.0f) / hip_bfloat16(-2.0f)))": -3,
        "int(float(hip_bfloat16(6.0f) - hip_bfloat16(2.0f)) * 8 + float(hip_bfloat16(6.0f) + hip_bfloat16(2.0f)))": 40,
        "(make_int4(9, 8, 7, 6) - make_int4(1, 2, 3, 4)).w * 10 + (~make_int2(0, 5)).y": 14,
        "int(100 * fmod(-7.0f, 4.0f) + atan2(0.0f, 1.0f) + 10 * pow(2.0f, 3.0f) + copysign(1.0f, -0.0f))": -221,
        "abs(-4) + 10 * max(2, 3) + 100 * min(2u, 3u)": 234, "isnan(NAN) + 2 * isinf(-INFINITY) + 4 * isfinite(1.0f)": 7,
        "__builtin_amdgcn_sudot4(false, 0x80ff7f01, true, 0x020304ff, 1, false)": -1 + 127 * 4 + 255 * 3 + 128 * 2 + 1,
        "__builtin_amdgcn_sudot4(true, 0x80ff7f01, false, 0x020304ff, 1, false)": 255 + 127 * 4 - 3 - 128 * 2 + 1,
        "__builtin_amdgcn_sdot4(0x80ff7f01, 0x020304ff, 1, false)": -1 + 127 * 4 - 3 - 128 * 2 + 1,
    }  # fmt: skip
    first = [5, 5, 7, 7, 100, -5, -1, 64, 64, 21, 9]
    atomics = """
  atomicAdd(box + 0, value), atomicSub(box + 1, value), atomicMax(box + 2, value), atomicMin(box + 3, value);
  atomicMax(box + 4, value), atomicMin(box + 5, value), atomicAnd(box + 6, value | 64), atomicOr(box + 7, value);
  atomicXor(box + 8, value), unsafeAtomicAdd(&sum, 0.5f);
  if (t == 5) r[0] = atomicExch(box + 9, 22), r[1] = atomicCAS(box + 10, 9, 11), r[2] = atomicCAS(box + 10, 9, 13);
  __syncthreads();
"""
    numbers = range(len(expected) + len(first) + 4)
    words = [*expected, *(f"box[{i}]" for i in range(len(first))), "int(sum)"]
    report, r = results(
        f"  __shared__ int box[{len(first)}];\n  __shared__ float sum;\n"
        + "".join(f"  if (t == 0) box[{i}] = {value};\n" for i, value in enumerate(first))
        + "  if (t == 0) sum = 1;\n  __syncthreads();\n"
        + atomics
        + "".join(f"  r[{i + 3}] = {word};\n" for i, word in enumerate(words)),
        "gfx942",
        len(numbers),
    )
    assert report.findings == ()
    values = np.arange(128) * 7 % 31
    total, either = int(values.sum()), int(np.bitwise_xor.reduce(values))
    left = [5 + total, 5 - total, 30, 0, 100, -5, 64, 64 | 31, 64 ^ either, 22, 11, 65]
    assert r[:3, 5].tolist() == [21, 9, 11]
    for word, got, wanted in zip(words, r[3:, 0], [*expected.values(), *left], strict=True):
        assert got == wanted, word


@pytest.mark.parametrize("arch", WAVES)
def test_lanes_that_are_not_there_do_not_take_part(arch):
    """Inside a branch the lanes of that branch meet, in the order of the kernel's lines though a template is elsewhere."""
    report, r = results(
        """
  r[0] = value;
  if (lane < 16) r[0] = __shfl_xor(value, 8);
  r[1] = lane;
  if (lane >= 8 && lane < 24)
    r[1] = tl::shfl_xor(lane, 1);
  r[2] = __shfl_xor(r[1], 4);
  r[3] = lane % 2 ? __builtin_amdgcn_readfirstlane(value) : __popcll(__ballot(1));
""",
        arch,
        4,
    )
    assert report.findings == ()
    wave = WAVES[arch]
    t, lane = np.arange(128), lane_of[wave]
    value, base = t * 7 % 31, t - lane_of[wave]
    inside = np.where((lane >= 8) & (lane < 24), lane ^ 1, lane)
    assert np.array_equal(r[0], np.where(lane < 16, value[base + (lane ^ 8) % wave], value))
    assert np.array_equal(r[1], inside)
    assert np.array_equal(r[2], inside[base + (lane ^ 4)])
    assert np.array_equal(r[3], np.where(lane % 2, value[base + 1], wave // 2))


def test_one_template_called_at_two_lines():
    """Lanes at different lines do not meet, though both stand at the same line of the template."""
    report, r = results(
        """
  if (lane % 2 == 0)
    r[0] = tl::shfl_xor(lane, 2);
  r[0] += 1000 * tl::shfl_xor(lane + 7, 1);
""",
        "gfx942",
        1,
    )
    assert report.findings == ()
    lane = lane_of[64]
    assert np.array_equal(r[0], np.where(lane % 2, 0, lane ^ 2) + 1000 * ((lane ^ 1) + 7))


def test_what_vectors_occupy():
    """Bytes, and the place in a struct behind one byte: as AMD's headers have it, by static_assert, but for `long4`."""
    types = {
        "char2": (2, 2),
        "char3": (3, 1),
        "uchar4": (4, 4),
        "short2": (4, 4),
        "ushort3": (6, 2),
        "short4": (8, 8),
        "int2": (8, 8),
        "float3": (12, 4),
        "uint4": (16, 16),
        "float4": (16, 16),
        "longlong2": (16, 16),
        "long4": (32, 16),
    }  # fmt: skip  AMD's is aligned to 32: here shared memory is aligned to 16
    statements = "".join(
        f"  struct S{i} {{ char c; {name} v; }}; r[{2 * i}] = sizeof({name}); r[{2 * i + 1}] = __builtin_offsetof(S{i}, v);\n"
        for i, name in enumerate(types)
    )
    report, r = results(statements, "gfx942", 2 * len(types))
    assert report.findings == ()
    assert r[:, 0].reshape(-1, 2).tolist() == [list(occupied) for occupied in types.values()]
