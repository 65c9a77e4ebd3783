"""Exceptions of the simulator; every message reads `name: rule; got value; do this`."""


class SimulatorError(RuntimeError):
    """Base of all errors of the simulator."""


class CompilerMissingError(SimulatorError):
    """No C++ compiler that can build a kernel was found."""


class CompileError(SimulatorError):
    """The kernel's text was refused; the message holds the compiler's message, with line numbers of the text."""


class TimeLimitError(SimulatorError):
    """The kernel ran past its time limit and was stopped."""


class CrashError(SimulatorError):
    """The kernel's process died; `report` holds what was found until then."""

    def __init__(self, message, report):
        super().__init__(message)
        self.report = report
