"""Plans: compiled kernels as one native object, called with raw torch tensors by one TVM-FFI call.

    plan = launcher().plan(recipe)       the operator: its arguments, and the key by which a call finds a variant
    plan.add(variant, cubins)            kernels for one value of the key
    plan(x, weight, out)                 checks the tensors, enqueues all kernels on the current stream
    bound = plan.bind(x, weight, out)    fixes the tensors too
    bound()

A plan works under graph capture, on any stream and device and from several threads, and leaves the current device alone. The
memory between its kernels is torch's: one allocation for each stream, which all plans share; a captured call has its own, from
the graph's pool. TMA descriptors are encoded once for each address and shape.

Recipes are dicts, lists, texts and integers alone, as JSON holds them; their integers may be expressions (`expression`):

| of a plan | |
| --- | --- |
| name | begins every error |
| arguments | name and type of each: "tensor" (None is allowed), "int", "float" or "str" |
| key | expressions; a variant is compiled for their values |
| size | one more expression, such as rows of the batch; a variant serves a range of it |

| of a variant | |
| --- | --- |
| key | the values |
| sizes | the first and the last size that it serves |
| target | as "sm_90a"; every cubin's ELF must prove it |
| tensors | name, dtype, shape and strides (None: any), alignment in bytes of each tensor that is not None |
| requirements | that (not 0), rule, got, hint: more rules, with the text of their errors |
| workspace | name and bytes of each slot; slots lie apart, at multiples of 256 bytes |
| constants | names of tensors that the variant keeps |
| steps | in order: launches and fills |

A launch has launch (the kernel's name), cubin (its number), grid, block, shared_bytes, cluster where there is one, pdl (1: it
may begin before the launch ahead of it has ended, since the kernel waits), and parameters: ["pointer", argument, slot or
constant, bytes from its start], ["int32", expression], ["float32", a float argument's value], or ["tensor_map", {...}] (of,
offset, dtype, extents, strides in bytes but the first, box, element_strides, interleave, swizzle, l2_promotion, fill: numbers
of cuTensorMapEncodeTiled). A fill has fill (what), bytes and byte. A launch with an empty grid is left out.

This file needs torch and apache-tvm-ffi alone, no tilelang and no CUDA: an exported folder holds a copy of it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import tvm_ffi

_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
_OF_CPYTHON = (
    "PyTuple_GetItem",
    "PyTuple_Size",
    "PyLong_AsLongLong",
    "PyFloat_AsDouble",
    "PyUnicode_AsUTF8AndSize",
    "PyErr_Occurred",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)


def find_library() -> Path:
    """Return the path of the native launcher: `lib/` beside this file's folder."""
    path = Path(__file__).resolve().parents[1] / "lib" / f"libtilelang_ext_launch{_SUFFIX}"
    if not path.is_file():
        raise ImportError(
            f"native launcher: must be built; got no file {path}; run `pip install --no-build-isolation -e .` in the checkout"
        )
    return path


@functools.cache
def _library() -> tvm_ffi.Module:
    return tvm_ffi.load_module(str(find_library()))


def arch_of(cubin: bytes) -> str:
    """Return the architecture that a cubin's ELF proves, as "sm_90a". Raises ValueError where it proves none."""
    return _library().arch_of(bytes(cubin))


def torch_exchange() -> int:
    """Return the address of torch's table of DLPack functions."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(
            f"native launcher: torch must have the DLPack exchange API; got torch {torch.__version__}; "
            "upgrade torch, or install torch-c-dlpack-ext"
        )
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return pointer(capsule, b"dlpack_exchange_api")


class Launcher:
    """The driver, torch's memory and the workspaces that plans share. A process needs one: see `launcher`."""

    def __init__(self, libcuda: str = "libcuda.so.1", exchange: int | None = None):
        """`libcuda` is the driver's library, opened by the first launch; `exchange` another table than torch's own."""
        addresses = {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _OF_CPYTHON}
        addresses |= {"None": id(None), "exchange": torch_exchange() if exchange is None else exchange}
        functions = _library().launcher(libcuda, addresses)
        self._plan, self._clear = functions["plan"], functions["clear"]

    def plan(self, recipe: dict) -> Plan:
        """Return a plan without variants."""
        return Plan(recipe, self._plan(recipe))

    def free_workspaces(self) -> None:
        """Give the memory between kernels back to torch; the next calls allocate it again."""
        self._clear()


@functools.cache
def launcher() -> Launcher:
    """Return the launcher of this process."""
    return Launcher()


class Plan:
    """An operator that launches natively. Call it with all its arguments, outputs too, in order.

    Raises TypeError and ValueError, as `name: rule; got value; do this`, for arguments that a variant was not prepared for.
    """

    __slots__ = ("_add", "_bind", "_call", "_key", "recipe")

    def __init__(self, recipe: dict, functions):
        self.recipe = recipe
        self._add, self._bind, self._call, self._key = (functions[name] for name in ("add", "bind", "call", "key"))
        for function in (self._bind, self._call, self._key):
            function.release_gil = False  # they read Python's objects; a call releases the lock before it launches

    @property
    def name(self) -> str:
        return self.recipe["name"]

    def add(self, variant: dict, cubins: Sequence[bytes], constants: Sequence[torch.Tensor] = ()) -> None:
        """Add a variant, in place of those of its key within its sizes.

        Raises ValueError for a cubin that does not prove the target, or that has other kernels.
        """
        self._add(variant, [bytes(cubin) for cubin in cubins], list(constants))

    def key(self, *arguments) -> tuple[list[int], int]:
        """Return the key of the arguments, and their size."""
        *key, size = self._key(id(arguments))
        return key, size

    def launch(self, arguments: tuple) -> bool:
        """Launch as a call does, with the arguments in a tuple; return False where no variant has their key."""
        return self._call(id(arguments))

    def __call__(self, *arguments) -> None:
        # The launcher reads the tuple itself, through torch's DLPack exchange: a tenth of what an FFI tensor each costs.
        if not self._call(id(arguments)):
            key, size = self.key(*arguments)
            raise LookupError(
                f"{self.name}: a plan must have a variant for its arguments; got none for key {key} and size {size}; add one"
            )

    def bind(self, *arguments) -> Callable[[], None]:
        """Return a function that launches with these arguments, and keeps their tensors."""
        return self._bind(id(arguments))
