"""What upstream's passes refuse by an InternalError, in one line that says the rule.

"[ThreadSync] Cannot lower a required shared-memory sync inside the then branch: ... Condition: 32 <= tx and tx < 96" is
"T.sync_threads: threads that meet inside of a branch must be whole waves; got ...; let ...".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from tvm.error import InternalError

# A part of upstream's text, the error that it is, and what that says; {} is the target, then the pattern's groups.
_ERRORS: tuple[tuple[str, type[Exception], str], ...] = (
    (
        r"\[ThreadSync\] Cannot lower a required shared-memory sync.*Condition: ([^\n]*)",
        ValueError,
        "T.sync_threads: threads that meet inside of a branch must be whole warps or waves; got the condition {1} on target "
        "{0}; let the branch begin and end at multiples of their size. If the branch has no T.sync_threads, its accesses seem "
        'to need one: place all of them yourself, with {{"tl.disable_thread_storage_sync": True}} in pass_configs',
    ),
    (
        r"nan_propagate=True for (?:fp16|float16)",
        NotImplementedError,
        "T.reduce_max: nan_propagate of 16-bit floats needs instructions of NVIDIA GPUs; got it on target {0}; leave "
        "it out, and look for NaN with T.isnan",
    ),
    (
        r"batch \((\d+)\) exceeds total output elements \((\d+)\)",
        ValueError,
        "T.finalize_reducer: batch must be at most the number of results of a thread; got {1} for {2} on target {0}; pass "
        "batch={2}",
    ),
    (
        r"cannot reinterpret fragment .* as (\d+)-bit elements",
        ValueError,
        "T.view: the elements of a fragment that make one wider element must lie next to each other in one thread; got a view "
        "as {1}-bit elements on target {0}; annotate a layout that has them so, or view a tile in shared memory",
    ),
    (
        r"StructuralEqual\(\)\(it->second\.indices, indices\)\) is false: (\w+): (\([^)]*\)) and (\([^)]*\))",
        ValueError,
        "T.Parallel: its iterations access a fragment at one place each, since that tells which thread has them; got {1} at "
        "{3} and at {2} on target {0}; write one T.Parallel for each, or keep {1} in shared memory",
    ),
)


def in_our_words(target: str) -> Callable[[Callable], Callable]:
    """Return a decorator of the function that lowers for `target`; other errors pass as they are."""

    def decorate(lower: Callable) -> Callable:
        @functools.wraps(lower)
        def lowered(*arguments):
            try:
                return lower(*arguments)
            except InternalError as error:
                text = str(error)
            for pattern, kind, message in _ERRORS:
                if found := re.search(pattern, text, re.DOTALL):
                    raise kind(message.format(target, *found.groups()))
            raise InternalError(text)

        return lowered

    return decorate
