"""The activation between the two GEMMs of a mixture of experts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BUILT_IN = ("swiglu", "silu", "clamped_silu")
_PREFIX = "custom "


class _Custom(NamedTuple):
    macro: Callable
    reference: Callable | None


_custom: dict[str, _Custom] = {}  # by name; a name tells what the macro computes


@dataclass(frozen=True)
class Activation:
    """The function of gate g and up u between the two GEMMs.

    swiglu (gpt-oss):             g * sigmoid(alpha * g) * (u + 1) with g = min(g, limit), u = clamp(u, -limit, limit)
    silu:                         g * sigmoid(g) * u
    clamped_silu (DeepSeek-V4):   g * sigmoid(g) * u with g = min(g, limit), u = clamp(u, -limit, limit)

    `Activation.custom` returns one that a user has written.
    """

    name: str = "swiglu"  # or another of BUILT_IN
    alpha: float = 1.702
    limit: float = 7.0

    @classmethod
    def custom(cls, macro: Callable, reference: Callable | None = None) -> Activation:
        """Return the activation that `macro` computes: a `T.macro` of float32 gate and up that returns one float32.

            @T.macro
            def relu_squared(gate, up):
                return T.max(gate, 0.0) * T.max(gate, 0.0) * up

            activation = Activation.custom(relu_squared)

        The macro is traced into the epilogue of the first GEMM, once per element. Its program is part of the name, and so
        of the key of plans and of the cache. `reference` is the same function of torch tensors, float64 gate and up; tensors
        on the CPU need it. What a macro raises when it is traced, it raises here.
        """
        name = f"{_PREFIX}{getattr(macro, '__name__', 'macro')} {_digest(macro)}"
        _custom[name] = _Custom(macro, reference or (_custom[name].reference if name in _custom else None))
        return cls(name, 0.0, 0.0)

    @property
    def is_known(self) -> bool:
        """Whether the name is built in, or that of a custom activation of this process."""
        return self.name in BUILT_IN or self.name in _custom

    @property
    def reference(self) -> Callable | None:
        """The function of torch tensors that a custom activation came with."""
        return _custom[self.name].reference

    def __call__(self, g, u, sigmoid=None):
        """Return the expression for float32 g and u; a kernel for one target may pass a `sigmoid` of its own."""
        # Here, since an exported folder has the class and no language.
        from tilelang_ext.language.swiglu import clamped_silu_of, sigmoid_of, silu_of, swiglu_of

        if self.name in _custom:
            return _custom[self.name].macro(g, u)
        sigmoid = sigmoid_of if sigmoid is None else sigmoid
        if self.name == "silu":
            return silu_of(g, u, sigmoid)
        if self.name == "clamped_silu":
            return clamped_silu_of(g, u, self.limit, sigmoid)
        return swiglu_of(g, u, self.alpha, self.limit, sigmoid)


def _digest(macro: Callable) -> str:
    """Return the digest of the program that a macro becomes."""
    from tilelang_ext import language as T

    @T.prim_func
    def traced(gate: T.Tensor((1,), "float32"), up: T.Tensor((1,), "float32"), out: T.Tensor((1,), "float32")):
        with T.Kernel(1, threads=1):
            out[0] = macro(gate[0], up[0])

    return hashlib.sha256(traced.script().encode()).hexdigest()[:16]
