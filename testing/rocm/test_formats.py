"""Every code of every fp8 type, as device text decodes it and as the stand-in for HIP's fp8 types converts it: bit-exact.

The text is plain C++ but for its attributes, so that the host's compiler can run it.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tilelang_ext import formats, quantization
from tilelang_ext.rocm.device_text import decoder_name, decoder_text
from tilelang_ext.rocm.toolchain import include_directory
from tilelang_ext.simulator.toolchain import find_compiler

REGISTERS = ("float16", "bfloat16")
# HIP's number of each type: __hip_fp8_interpretation_t.
KINDS = {formats.E4M3: 0, formats.E5M2: 1, formats.E4M3_FNUZ: 2, formats.E5M2_FNUZ: 3}
RUN_SECONDS = 60


def run(folder, text):
    """Compile and run a host program; what it wrote, as bytes."""
    (folder / "hip").mkdir()
    (folder / "hip" / "hip_runtime.h").write_text("#define __host__\n#define __device__\n#define __forceinline__ inline\n")
    (folder / "program.cpp").write_text(text)
    flags = ["-x", "c++", "-std=c++17", "-O1", f"-I{folder}", f"-I{include_directory()}"]
    command = [*find_compiler().command, *flags, str(folder / "program.cpp"), "-o", str(folder / "program")]
    if sys.platform != "darwin":
        command.append("-lm")
    subprocess.run(command, check=True, capture_output=True, timeout=RUN_SECONDS)
    return subprocess.run([folder / "program"], check=True, capture_output=True, timeout=RUN_SECONDS).stdout


def equal(found, expected):
    return np.array_equal(np.nan_to_num(found, nan=-1e30), np.nan_to_num(expected, nan=-1e30)) and np.array_equal(
        np.signbit(found[found == 0]), np.signbit(expected[found == 0])
    )


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """{(format, register type): values of codes 0..255}, by the device text."""
    pairs = [(format, register) for format in KINDS for register in REGISTERS]
    calls = "".join(
        f"  {decoder_name(format.dtype, register)}<256>(values, codes);\n  fwrite(values, 2, 256, stdout);\n"
        for format, register in pairs
    )
    text = "".join(decoder_text(format.dtype, register) for format, register in pairs)
    output = run(
        tmp_path_factory.mktemp("decode"),
        f"""#include <stdio.h>
{text}
int main() {{
  unsigned char codes[256];
  unsigned short values[256];
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<unsigned char>(i);
{calls}}}
""",
    )
    bits = np.frombuffer(output, np.uint16).reshape(len(pairs), 256)
    values = {}
    for pair, row in zip(pairs, bits, strict=True):
        values[pair] = torch.from_numpy(row.copy()).view(getattr(torch, pair[1])).double().numpy()
    return values


@pytest.mark.parametrize("format", KINDS, ids=lambda format: format.dtype)
@pytest.mark.parametrize("register", REGISTERS)
def test_decoded_in_registers(decoded, format, register):
    assert equal(decoded[format, register], np.array(format.values))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(values of codes, codes of all halves) of each format, by the stand-in for HIP's fp8 header."""
    output = run(
        tmp_path_factory.mktemp("convert"),
        """#include <stdio.h>
#include <hip/amd_detail/amd_hip_fp8.h>
int main() {
  for (int kind = 0; kind < 4; ++kind) {
    const __hip_fp8_interpretation_t type = static_cast<__hip_fp8_interpretation_t>(kind);
    for (int i = 0; i < 256; ++i) {
      const float value = __hip_fp8_to_float(static_cast<__hip_fp8_storage_t>(i), type);
      fwrite(&value, 4, 1, stdout);
    }
    for (int i = 0; i < 65536; ++i) {
      const float value = static_cast<float>(__builtin_bit_cast(_Float16, static_cast<unsigned short>(i)));
      const __hip_fp8_storage_t code = __hip_cvt_float_to_fp8(value, __HIP_SATFINITE, type);
      fwrite(&code, 1, 1, stdout);
    }
  }
}
""",
    )
    found = {}
    for format, kind in KINDS.items():
        part = output[kind * (1024 + 65536) :][: 1024 + 65536]
        found[format] = np.frombuffer(part[:1024], np.float32).astype(np.float64), np.frombuffer(part[1024:], np.uint8)
    return found


@pytest.mark.parametrize("format", KINDS, ids=lambda format: format.dtype)
def test_stand_in_decodes(converted, format):
    assert equal(converted[format][0], np.array(format.values))


@pytest.mark.parametrize("format", KINDS, ids=lambda format: format.dtype)
def test_stand_in_encodes_as_the_project_does(converted, format):
    """Over all 65,536 halves; NaN may be any of a format's NaN codes."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    expected = quantization.encode(halves, format).view(torch.uint8).numpy()
    found = converted[format][1]
    nan = np.isnan(halves.numpy())
    assert np.array_equal(found[~nan], expected[~nan])
    assert set(found[nan].tolist()) <= set(format.nan_codes)
