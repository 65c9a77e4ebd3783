"""Plans: compiled kernels as one native object, called with raw torch tensors.

    plan = launcher().plan(recipe)       the operator: its arguments, and the key by which a call finds a variant
    plan.add(variant, cubins)            kernels for one value of the key
    plan(x, weight, out)                 checks the tensors, enqueues all kernels on the current stream
    bound = plan.bind(x, weight, out)    fixes the tensors too
    bound()

A plan works under graph capture, on any stream and device and from several threads, and leaves the current device alone. The
memory between its kernels is torch's: one allocation for each stream, which all plans share; a captured call has its own, from
the graph's pool. TMA descriptors are encoded once for each address and shape, and a call that repeats another, on the same
stream with tensors at the same places, enqueues what was computed for that one.

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

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import tvm_ffi

_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
_OF_CPYTHON = (
    "PyTuple_GetItem",
    "PyTuple_Size",
    "PyDict_Size",
    "PyLong_AsLongLong",
    "PyFloat_AsDouble",
    "PyUnicode_AsUTF8AndSize",
    "PyErr_Occurred",
    "PyErr_Clear",
    "PyErr_SetString",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
    "PyType_FromSpec",
    "PyType_GetSlot",
    "PyType_GenericNew",
    "PyObject_Type",
    "PyObject_CallNoArgs",
    "PyObject_GetAttr",
    "PyObject_IsTrue",
    "Py_IncRef",
    "Py_DecRef",
)
_OBJECTS = (None, True, False, TypeError, ValueError, LookupError, RuntimeError)
# While one of these returns something true, somebody looks at operators: modes, a trace, a profiler; or a transform.
_OBSERVERS = {
    "dispatch_modes": torch._C._len_torch_dispatch_stack,
    "function_modes": torch._C._len_torch_function_stack,
    "tracing_state": torch._C._get_tracing_state,
    "is_profiled": torch.autograd._profiler_enabled,
}
_TRANSFORMS = torch._C._functorch.peek_interpreter_stack
_REQUIRES_GRAD = sys.intern("requires_grad")
# Functions of torch's libraries, by the names of their symbols.
_OF_TORCH = {
    "to_dlpack": ("torch_cpu", "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor"),
    "requires_grad_of": ("c10", "_ZNK3c1010TensorImpl13requires_gradEv"),
    "dispatch_modes": ("c10", "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv"),
    "function_modes": ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv"),
    "tracing_state": ("torch_cpu", "_ZN5torch3jit6tracer15getTracingStateEv"),
    "is_profiled": ("torch_cpu", "_ZN5torch8profiler4impl15profilerEnabledEv"),
}


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
    tvm_ffi.register_error("LookupError", LookupError)  # else tvm_ffi raises RuntimeError in its place
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


def torch_functions() -> dict[str, int]:
    """Return the addresses of `_OF_TORCH`, and the offsets at which a Python tensor has its at::Tensor and its type.

    They do what torch's functions in Python do, sooner. All are 0 where one cannot be told for certain, as in another torch.
    """
    unknown = dict.fromkeys((*_OF_TORCH, "offset", "type_offset"), 0)
    tensors = (torch.empty(2), torch.empty(1, dtype=torch.int8), torch.nn.Parameter(torch.empty(3), requires_grad=False))
    found = {}
    for name, value in (("offset", lambda tensor: tensor._cdata), ("type_offset", lambda tensor: id(type(tensor)))):
        offsets = set.intersection(*({o for o in range(0, 64, 8) if _word(id(t) + o) == value(t)} for t in tensors))
        if len(offsets) == 1:
            found[name] = offsets.pop()
    for name, (library, symbol) in _OF_TORCH.items():
        path = Path(torch.__file__).with_name("lib") / f"lib{library}{_SUFFIX}"
        with contextlib.suppress(AttributeError, OSError):
            found[name] = ctypes.cast(getattr(ctypes.CDLL(str(path)), symbol), ctypes.c_void_p).value
    return found if found.keys() == unknown.keys() else unknown


def _word(address: int) -> int | None:
    return ctypes.c_void_p.from_address(address).value


class Launcher:
    """The driver, torch's memory and the workspaces that plans share. A process needs one: see `launcher`."""

    def __init__(self, libcuda: str = "libcuda.so.1", exchange: int | None = None, functions: Mapping[str, int] | None = None):
        """`libcuda` is the driver's library, opened by the first launch; `exchange` and `functions` replace torch's own."""
        functions = torch_functions() if functions is None else functions
        observers = (_TRANSFORMS, *(observer for name, observer in _OBSERVERS.items() if not functions[name]))
        addresses = {
            **functions,
            "exchange": torch_exchange() if exchange is None else exchange,
            "Tensor": id(torch.Tensor),
            "Parameter": id(torch.nn.Parameter),
            "requires_grad": id(_REQUIRES_GRAD),
            "is_grad_enabled": id(torch.is_grad_enabled),
        }
        functions = _library().launcher(libcuda, addresses, [id(observer) for observer in observers])
        self._plan, self._clear = functions["plan"], functions["clear"]

    def plan(self, recipe: dict, members: Mapping[str, Mapping[object, int]] | None = None) -> Plan:
        """Return a plan without variants. `members` has, by name, integer arguments that are given by objects alone, such as
        the members of an enum, and the integer that each stands for.
        """
        plan = _types()[0]()
        plan.recipe, plan._members = recipe, members or {}
        numbers = {argument["name"]: number for number, argument in enumerate(recipe["arguments"])}
        flat = [[numbers[name], id(object), n] for name, values in plan._members.items() for object, n in values.items()]
        functions = self._plan(id(plan), recipe, flat)
        plan._add, plan._key, plan._bind = (functions[name] for name in ("add", "key", "bind"))
        for function in (plan._key, plan._bind):
            function.release_gil = False  # they read Python's objects
        return plan

    def free_workspaces(self) -> None:
        """Give the memory between kernels back to torch; the next calls allocate it again."""
        self._clear()


@functools.cache
def launcher() -> Launcher:
    """Return the launcher of this process."""
    return Launcher()


@functools.cache
def _types() -> tuple[type[Plan], type]:
    """Return the types of plans and of what `bind` returns: both derive from the native type, whose calls launch."""
    addresses = {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _OF_CPYTHON}
    addresses |= {getattr(value, "__name__", str(value)): id(value) for value in _OBJECTS}
    connect = _library().get_function("connect")
    connect.release_gil = False  # it makes a type
    native = ctypes.cast(connect({**addresses, "object_size": object.__basicsize__}), ctypes.py_object).value
    slots = ("_add", "_bind", "_key", "_members", "recipe")
    return type("Plan", (native, Plan), {"__slots__": slots, "__doc__": Plan.__doc__}), native


class Plan:
    """An operator that launches natively: plan(*arguments) launches, with all its arguments, outputs too, in order.

    Raises TypeError and ValueError, as `name: rule; got value; do this`, for arguments that a variant was not prepared for,
    and LookupError where no variant has their key. Two more methods are native: `launch(*arguments)` returns False in place of
    that LookupError; `launch_directly(*arguments)` is for operators of torch, see `kernels.scaled_mm.operator`.
    """

    __slots__ = ()

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

    def bind(self, *arguments) -> Callable[[], None]:
        """Return a function that launches with these arguments, and keeps their tensors. Raises what a call raises."""
        bound = _types()[1]()
        self._bind(id(arguments), id(bound))
        return bound
