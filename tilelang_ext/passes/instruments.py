"""Pass contexts that differ from the current one by an instrument."""

from __future__ import annotations

from tvm.ir.instrument import PassInstrument
from tvm.ir.transform import PassContext


def instrumented(instrument: PassInstrument) -> PassContext:
    """Return the current context with one more instrument."""
    given = PassContext.current()
    instruments = [*(given.instruments or ()), instrument]
    return PassContext(given.opt_level, given.required_pass, given.disabled_pass, instruments, dict(given.config))
