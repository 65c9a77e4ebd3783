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
