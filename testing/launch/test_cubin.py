"""What a cubin proves about its target: real ones of nvcc, and headers made here, wrong, plain, torn and lying."""

import shutil
import subprocess

import pytest
from launch.fakes import cubin

from tilelang_ext.launch.plan import arch_of

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler, on PATH")
KERNELS = {"add_kernel": [8, 8, 4]}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120a"])
@pytest.mark.parametrize("abi", [7, 8])
def test_headers_of_both_toolkits(arch, abi):
    assert arch_of(cubin(arch, KERNELS, abi)) == arch


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100a"])
def test_nvcc(arch, tmp_path):
    source, binary = tmp_path / "add.cu", tmp_path / "add.cubin"
    source.write_text('extern "C" __global__ void add(float* a, int n) { if (threadIdx.x < n) a[threadIdx.x] += 1; }')
    subprocess.run(["nvcc", "-cubin", f"-arch={arch}", source, "-o", binary], check=True, timeout=120)
    assert arch_of(binary.read_bytes()) == arch


def test_the_command_line_proves_nothing():
    """ptxas repeats `-arch sm_90a` in a note; the machine code is what `.nv.compat` says."""
    assert arch_of(cubin("sm_90", KERNELS, note="-arch sm_90a -m 64")) == "sm_90"


def test_every_torn_file_is_refused():
    whole = cubin("sm_90a", KERNELS)
    for size in range(len(whole)):
        with pytest.raises(ValueError, match="must be a cubin whose ELF proves its architecture; got one that"):
            arch_of(whole[:size])


@pytest.mark.parametrize(
    ("binary", "got"),
    [
        (b"// PTX\n.version 8.0\n.target sm_90a\n" * 8, "is no ELF"),
        (cubin("sm_90a", KERNELS, abi=9), "has ABI version 9"),
        (cubin("sm_90a", KERNELS).replace(b".nv.compat", b".nv.kompat"), "has no .nv.compat"),
        (cubin("sm_90a", KERNELS).replace(bytes([2, 9, 1, 0]), bytes([2, 8, 1, 0])), "has no .nv.compat"),
        (b"\x7fELF\x02\x01\x01" + bytes(200), "is not of a GPU"),
    ],
)
def test_what_proves_nothing_is_refused(binary, got):
    with pytest.raises(ValueError, match=got):
        arch_of(binary)


def test_family_code_is_no_sm_100a():
    """Code for a family of chips has no accelerator's mark: it passes for the plain target, and for no other."""
    assert arch_of(cubin("sm_100f", KERNELS)) == "sm_100"
