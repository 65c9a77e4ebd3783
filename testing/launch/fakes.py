"""A CUDA driver that writes down what it is told, a torch whose tensors seem to be on CUDA, and cubins of headers alone."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tilelang_ext.launch import record
from tilelang_ext.launch.plan import Launcher, Plan, torch_exchange, torch_functions
from tilelang_ext.launch.recipe import Lowered, lower

_BYTES = {"pointer": 8, "tensor_map": 128, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float32": 4, "float64": 8}


@functools.cache
def library() -> tuple[ctypes.CDLL, str]:
    """Build fake_driver.c, once in a process; the library and its path."""
    compiler = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    path = Path(tempfile.mkdtemp(prefix="fake_driver"), "libcuda_fake.so")
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-fexceptions", "-pthread", str(source), "-o", str(path)], check=True, timeout=60
    )
    built = ctypes.CDLL(str(path))
    built.fake_log.restype = ctypes.c_char_p
    for name in ("fake_exchange", "fake_to_dlpack"):
        getattr(built, name).restype, getattr(built, name).argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    for name in ("fake_stream", "fake_capture"):
        getattr(built, name).argtypes = (ctypes.c_void_p,)
    built.fake_elsewhere.argtypes = (ctypes.c_void_p, ctypes.c_int)
    return built, str(path)


class Launch(NamedTuple):
    """One launch, as the driver was told it."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    context: int  # device whose context was current
    attributes: dict[int, tuple[int, ...]]
    parameters: list[int]  # little-endian; of a TMA descriptor its address, two extents above it


def _integer(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text), "little")


class FakeCuda:
    """The driver and its launcher; each starts with one H200, cuda:0, whose context is current, and the default stream."""

    def __init__(self, by_exchange: bool = False):
        self.driver, path = library()
        self.driver.fake_reset()
        self.driver.fake_capability(90)
        self.driver.fake_device(0)
        self.driver.fake_elsewhere(None, 0)
        self.driver.fake_set_current(0)
        self.driver.fake_stream(None)
        functions = torch_functions()
        assert functions["offset"], "tensors of this torch must be read directly"
        functions["to_dlpack"] = self.driver.fake_to_dlpack(functions["to_dlpack"])
        if by_exchange:
            functions = dict.fromkeys(functions, 0)
        self.torch = self.driver.fake_exchange(torch_exchange()), functions
        self.launcher = Launcher(path, *self.torch)

    def plan(self, name: str, arguments: dict[str, str], variant: dict, key=(), size=0, arch="sm_90a", constants=()) -> Plan:
        """Return a plan with one variant, of a cubin made for it; `arguments` are names and types."""
        recipe = {
            "name": name,
            "arguments": [{"name": argument, "type": type} for argument, type in arguments.items()],
            "key": list(key),
            "size": size,
        }
        plan = self.launcher.plan(recipe)
        self.add(plan, variant, arch, constants)
        return plan

    def add(self, plan: Plan, variant: dict, arch="sm_90a", constants=()) -> None:
        base = {"key": [], "sizes": [0, 0], "target": arch, "requirements": [], "workspace": [], "constants": []}
        variant = {**base, **variant}
        plan.add(variant, [cubin_of(variant)], constants)

    def log(self) -> list[str]:
        return self.driver.fake_log().decode().splitlines()

    def lines(self, first_word: str) -> list[str]:
        return [line for line in self.log() if line.split()[0] == first_word]

    def launches(self) -> list[Launch]:
        pattern = (
            r"launch (\w+) grid (\d+) (\d+) (\d+) block (\d+) (\d+) (\d+) shared (\d+) stream (\w+) context (-?\d+) "
            r"attributes(.*) parameters(.*)"
        )
        found = []
        for line in self.lines("launch"):
            kernel, *sizes, shared, stream, context, attributes, parameters = re.fullmatch(pattern, line).groups()
            numbers = tuple(map(int, sizes))
            found.append(
                Launch(
                    kernel,
                    numbers[:3],
                    numbers[3:],
                    int(shared),
                    int(stream, 16),
                    int(context),
                    {int(id): tuple(map(int, values.split(","))) for id, values in (a.split(":") for a in attributes.split())},
                    [_integer(parameter) for parameter in parameters.split()],
                )
            )
        return found


def launch(kernel: str, parameters: list, grid=(1, 1, 1), **others) -> dict:
    """A launch step; other entries as the recipe has them."""
    step = {"launch": kernel, "cubin": 0, "grid": list(grid), "block": [128, 1, 1], "shared_bytes": 0, "pdl": 0}
    return {**step, "parameters": parameters, **others}


def tensor(name: str, shape: list, dtype="float32", strides=None, alignment=16) -> dict:
    """The rule of a tensor."""
    return {"name": name, "dtype": dtype, "shape": shape, "strides": strides, "alignment": alignment}


_made: dict[str, tuple[Lowered, bytes]] = {}


def compile_without_nvcc(monkeypatch) -> None:
    """Make `record` lower each kernel once in a process, without nvcc and the cache on disk; cubins have headers alone."""

    def compile_cached(key, make, arch, pass_configs) -> tuple[Lowered, bytes]:
        if repr(key) not in _made:
            lowered = lower(make(), arch, pass_configs)
            _made[repr(key)] = lowered, cubin_of(lowered.variant)
        return _made[repr(key)]

    monkeypatch.setattr(record, "kernel", record.kernel.__wrapped__)
    monkeypatch.setattr(record, "compile_cached", compile_cached)


def cubin_of(variant: dict) -> bytes:
    """Return a cubin with the kernels of a variant, for its target."""
    steps = [step for step in variant["steps"] if "launch" in step]
    kernels = {step["launch"]: [_BYTES[parameter[0]] for parameter in step["parameters"]] for step in steps}
    return cubin(variant["target"], kernels)


def cubin(arch: str, kernels: dict[str, list[int]], abi: int = 8, note: str = "") -> bytes:
    """An ELF with what ptxas writes of the architecture and of the parameters of kernels, and no code.

    `abi` is 8 for CUDA 13, 7 for CUDA 12; `note` stands where ptxas repeats its command line. The fake driver reads sizes of
    parameters from notes of its own.
    """
    sm, accelerator = int(arch.removeprefix("sm_").rstrip("af")), arch.endswith("a")
    sections = [("", 0, b""), (".note.nv.tkinfo", 7, note.encode())]
    if abi >= 8:
        sections.append((".nv.compat", 0x70000086, bytes([2, 9, accelerator, 0, 2, 2, 1, 0])))
    for kernel, sizes in kernels.items():
        sections.append((f".note.{kernel}", 7, " ".join(["parameters", kernel, *map(str, sizes), "\n"]).encode()))
        info, offset = bytes([1, 0x37, 0, 0]), 0
        for ordinal, size in reversed(list(enumerate(sizes))):
            info += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, ordinal, offset, size << 18 | 0xF000)
        sections.append((f".nv.info.{kernel}", 0x70000000, info))
    names = b"\0".join([b"", *(name.encode() for name, _, _ in sections[1:]), b".shstrtab", b""])
    sections.append((".shstrtab", 3, names))
    body, headers, offset = b"", b"", 64
    for name, kind, content in sections:
        at = names.index(b"\0" + name.encode() + b"\0") + 1 if name else 0
        headers += struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, offset, len(content), 0, 0, 1, 0)
        body += content
        offset += len(content)
    flags = sm << 8 | 0x6000004 if abi >= 8 else sm << 16 | 0x500 | accelerator << 11 | sm
    header = b"\x7fELF" + bytes([2, 1, 1, 0x41 if abi >= 8 else 0x33, abi]) + bytes(7)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, offset, flags, 64, 56, 0, 64, len(sections), len(sections) - 1)
    return header + body + headers
