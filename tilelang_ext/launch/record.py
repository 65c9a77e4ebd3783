"""Several kernels as one variant of a plan: an operator's launch code runs once, on views, and what it launches is kept.

    recorder = Recorder("moe", "sm_90a")
    x = recorder.argument("x", "bfloat16", (shape("x", 0), 2880))
    hidden = recorder.empty(x.shape[0], 2880, dtype="bfloat16")        a workspace slot
    recorder.compile(kernel, 2880)(x, hidden)                          a launch
    plan.add(recorder.variant(key, sizes), recorder.cubins, recorder.constants)

`Recorder` has the methods by which launch code compiles and allocates, and `View` those of torch.Tensor that change a shape
alone. Extents are ints, or expressions over the arguments' shapes where they differ from call to call. What a kernel demands
of its tensors is checked here where it is known, else in each call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tvm import DataType

from tilelang_ext.launch import expression
from tilelang_ext.launch.cache import is_cached, until_reload
from tilelang_ext.launch.expression import Expression, recipe_of
from tilelang_ext.launch.recipe import ALIGNMENT, Lowered, compile_cached

Extent = int | Expression


@until_reload
def kernel(make: Callable, arguments: tuple, arch: str, pass_configs: tuple) -> tuple[Lowered, bytes]:
    """Return make(*arguments), a prim_func, lowered, and its cubin.

    It is compiled once in a process, and once for all processes: see `cache`. The names and values that `make` and the
    arguments show in their repr tell them apart.
    """
    key = _key(make, arguments, arch, pass_configs)
    return compile_cached(key, functools.partial(make, *arguments), arch, dict(pass_configs))


def is_compiled(make: Callable, arguments: tuple, arch: str, pass_configs: tuple) -> bool:
    """Return whether `kernel` would find what it returns."""
    return is_cached(_key(make, arguments, arch, pass_configs))


def _key(make: Callable, arguments: tuple, arch: str, pass_configs: tuple) -> tuple:
    return make.__module__, make.__qualname__, arguments, arch, pass_configs


@dataclass(frozen=True)
class View:
    """A tensor that a call will have: an argument, a slot of the workspace or a constant, from an offset on."""

    buffer: str
    dtype: str  # by TileLang's name
    shape: tuple[Extent, ...]
    strides: tuple[Extent, ...]  # in elements
    offset: Extent = 0  # in bytes

    def contiguous(self) -> View:
        """Return the view. Raises ValueError where torch would copy."""
        if _recipes(self.strides) != _recipes(expression.contiguous_strides(self.shape)):
            raise ValueError(
                f"{self.buffer}: must be contiguous in a plan; got strides {self.strides}; copy it before the call"
            )
        return self

    def view(self, *shape: Extent) -> View:
        """Return the elements in another shape, one of whose extents may be -1."""
        self.contiguous()
        if -1 in [extent for extent in shape if isinstance(extent, int)]:
            at = next(i for i, extent in enumerate(shape) if isinstance(extent, int) and extent == -1)
            others = math.prod((*shape[:at], *shape[at + 1 :]))
            shape = (*shape[:at], math.prod(self.shape) // others, *shape[at + 1 :])
        return replace(self, shape=shape, strides=tuple(expression.contiguous_strides(shape)))

    def unflatten(self, dimension: int, sizes: Sequence[Extent]) -> View:
        """Return the view with one dimension divided, one of whose sizes may be -1."""
        inner = View(self.buffer, self.dtype, (self.shape[dimension],), (1,)).view(*sizes)
        return replace(
            self,
            shape=(*self.shape[:dimension], *inner.shape, *self.shape[dimension + 1 :]),
            strides=(
                *self.strides[:dimension],
                *(stride * self.strides[dimension] for stride in inner.strides),
                *self.strides[dimension + 1 :],
            ),
        )

    def flatten(self, first: int = 0, last: int = -1) -> View:
        """Return the view with dimensions from `first` to `last`, which lie next to one another, made one."""
        last %= len(self.shape)
        self.contiguous()
        return self.view(*self.shape[:first], math.prod(self.shape[first : last + 1]), *self.shape[last + 1 :])


class Recorder:
    """What launch code compiles and allocates by, in place of a device; see the module."""

    def __init__(self, name: str, arch: str):
        self.name, self.arch = name, arch
        self.cubins: list[bytes] = []
        self.constants: list[Tensor] = []
        self._tensors: dict[str, dict] = {}
        self._workspace: list[dict] = []
        self._requirements: list[dict] = []
        self._steps: list[dict] = []

    def argument(
        self,
        name: str,
        dtype: str,
        shape: Sequence[Extent],
        strides: Sequence[Extent] | None = None,
        alignment: int = ALIGNMENT,
    ) -> View:
        """Return an argument of the plan, and make its shape, strides (None: contiguous) and alignment a rule of the variant.

        An extent or a stride that is a fact about the same place of the argument itself may have any value.
        """
        strides = tuple(expression.contiguous_strides(shape) if strides is None else strides)
        self._tensors[name] = {
            "name": name,
            "dtype": dtype,
            "shape": _rules(shape, name, expression.shape),
            "strides": _rules(strides, name, expression.stride),
            "alignment": alignment,
        }
        return View(name, dtype, tuple(shape), strides)

    def empty(self, *shape: Extent, dtype: str) -> View:
        """Return a slot of the workspace."""
        name = f"workspace_{len(self._workspace)}"
        size = functools.reduce(lambda size, extent: size * extent, shape, DataType(dtype).bits // 8)
        self._workspace.append({"name": name, "bytes": recipe_of(size)})
        return View(name, dtype, shape, tuple(expression.contiguous_strides(shape)))

    def constant(self, tensor: Tensor) -> View:
        """Return a contiguous tensor that the variant keeps, on the device of the arguments."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(tensor)
        return View(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride())

    def compile(self, make: Callable, *arguments, pass_configs: Mapping[str, bool] | None = None) -> Callable[..., None]:
        """Return a function of views that launches the prim_func make(*arguments)."""
        lowered, cubin = kernel(make, arguments, self.arch, tuple((pass_configs or {}).items()))
        return functools.partial(self._launch, lowered, cubin)

    def variant(self, key: Sequence[int], sizes: tuple[int, int]) -> dict:
        """Return what was recorded as a variant for one key and a range of sizes."""
        return {
            "key": list(key),
            "sizes": list(sizes),
            "target": self.arch,
            "tensors": list(self._tensors.values()),
            "requirements": self._requirements,
            "workspace": self._workspace,
            "constants": [f"constant_{i}" for i in range(len(self.constants))],
            "steps": self._steps,
        }

    def _launch(self, lowered: Lowered, cubin: bytes, *views: View) -> None:
        names = [argument["name"] for argument in lowered.arguments]
        if len(names) != len(views):
            raise TypeError(
                f"{lowered.name}: must be launched with {len(names)} tensors; got {len(views)}; pass {', '.join(names)}"
            )
        given = dict(zip(names, views, strict=True))

        def resolve(recipe) -> expression.Recipe:
            return recipe_of(expression.substitute(recipe, lambda fact: _fact_of(given, fact)))

        for rule in lowered.variant["tensors"]:
            self._check(lowered.name, rule, given[rule["name"]], resolve)
        if cubin not in self.cubins:
            self.cubins.append(cubin)
        for step in lowered.variant["steps"]:
            self._steps.append(
                {
                    **step,
                    "cubin": self.cubins.index(cubin),
                    "grid": [resolve(size) for size in step["grid"]],
                    "shared_bytes": resolve(step["shared_bytes"]),
                    "parameters": [_resolved(parameter, given, resolve) for parameter in step["parameters"]],
                }
            )

    def _check(self, kernel: str, rule: dict, view: View, resolve: Callable) -> None:
        """Check what a kernel demands of a tensor, and leave to each call what only a call can tell."""
        name = f"{rule['name']} of {kernel}"
        if view.dtype != rule["dtype"] or len(view.shape) != len(rule["shape"]):
            raise ValueError(
                f"{self.name}: {name} must be {rule['dtype']} with {len(rule['shape'])} dimensions; got {view.dtype} "
                f"{view.shape}; reshape it"
            )
        for values, rules, what in ((view.shape, rule["shape"], "extent"), (view.strides, rule["strides"], "stride")):
            for i, (value, wanted) in enumerate(zip(values, rules, strict=True)):
                if wanted is None:
                    continue
                got, wanted = recipe_of(value), resolve(wanted)
                if got == wanted or (what == "stride" and recipe_of(view.shape[i]) == 1):
                    continue
                if isinstance(got, int) and isinstance(wanted, int):
                    raise ValueError(
                        f"{self.name}: {name} must have {what} {wanted} in dimension {i}; got {got}; check the sizes"
                    )
                that = expression.apply("==", got, wanted)
                if what == "stride":
                    that = expression.apply("or", that, expression.apply("==", view.shape[i], 1))
                requirement = {
                    "that": that.recipe,
                    "got": got,
                    "rule": f"{name} must have the {what} of its kernel in dimension {i}",
                    "hint": "check the sizes of the arguments",
                }
                if requirement not in self._requirements:
                    self._requirements.append(requirement)
        alignment = self._tensors.get(view.buffer, {}).get("alignment", rule["alignment"])
        if alignment % rule["alignment"]:
            raise ValueError(
                f"{self.name}: {name} must start at a multiple of {rule['alignment']} bytes; got an argument of {alignment}; "
                "demand it of the argument"
            )


def _recipes(values: Sequence[Extent]) -> list[expression.Recipe]:
    return [recipe_of(value) for value in values]


def _rules(values: Sequence[Extent], name: str, fact: Callable) -> list:
    """Return recipes, None for a fact about its own place."""
    return [None if recipe == fact(name, i).recipe else recipe for i, recipe in enumerate(_recipes(values))]


def _fact_of(given: Mapping[str, View], fact: list) -> Extent:
    kind, name, dimension = fact
    return getattr(given[name], {"shape": "shape", "stride": "strides"}[kind])[dimension]


def _resolved(parameter: list, given: Mapping[str, View], resolve: Callable) -> list:
    """Return a parameter of a kernel in terms of the plan's arguments."""
    kind, value, *_ = parameter
    if kind == "pointer":
        return [kind, given[value].buffer, recipe_of(given[value].offset)]
    if kind != "tensor_map":
        return [kind, resolve(value)]
    view = given[value["of"]]
    return [
        kind,
        {
            **value,
            "of": view.buffer,
            "offset": recipe_of(view.offset),
            "extents": [resolve(extent) for extent in value["extents"]],
            "strides": [resolve(stride) for stride in value["strides"]],
        },
    ]
