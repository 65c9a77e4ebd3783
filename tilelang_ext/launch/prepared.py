"""An operator with what does not change from call to call fixed: what its `prepare` returns."""

from __future__ import annotations

import functools
from collections.abc import Callable


class Prepared:
    """Call it with the tensors that change, as its operator's `prepare` says."""

    def __init__(self, call: Callable, bind: Callable[..., Callable[[], None] | None]):
        """`call` computes; `bind` returns a function that launches with given tensors, None where no plan launches."""
        self._call, self._bind = call, bind

    def __call__(self, *tensors, **options):
        """Compute, with the errors of the operator."""
        return self._call(*tensors, **options)

    def bind(self, *tensors, out) -> Callable[[], object]:
        """Return a function that computes `out` from these tensors each time it is called, and keeps them all.

        On NVIDIA GPUs the tensors are checked once, and kernels that are missing are compiled now. Raises what the operator
        raises, and TypeError or ValueError for tensors that it would convert or copy first.
        """
        return self._bind(*tensors, out) or functools.partial(self._call, *tensors, out=out)
