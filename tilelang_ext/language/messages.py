"""What is printed when an intrinsic refuses its arguments: the error, and nothing before it.

`T.prim_func` logs the text that it generated for a function, dozens of lines, before it raises what went wrong in it. Where an
intrinsic of this package raised it, or was called with other arguments than it has, that text says nothing: the error names
the argument, the rule and what to do.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1])
_UPSTREAM = "tilelang.language.eager.builder"


class _WithoutSource(logging.Filter):
    """Drops the text of a function from the log where the error says all."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if error is None or not record.getMessage().startswith("Failed to build prim_func"):
            return True
        deepest = traceback.extract_tb(error.__traceback__)[-1].filename
        called_wrongly = isinstance(error, TypeError) and str(error).partition("(")[0] in self.names
        return not (deepest.startswith(_PACKAGE) or called_wrongly)


def quieten(names: frozenset[str]) -> None:
    """Drop the text of a function from upstream's log where one of our intrinsics, called `names`, refused its arguments."""
    logging.getLogger(_UPSTREAM).addFilter(_WithoutSource(names))
