"""The C++ compiler that upstream calls for target c, with upstream's templates compiled once for all tests.

They are thousands of lines and take two thirds of the CPU time of compiling a kernel; a precompiled header of g++ changes no
byte of the library. Upstream takes the compiler from CXX, which the processes that tests start inherit.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

_HEADER = "tl_templates/cpp/common.h"  # the first include of every kernel
_FLAGS = "-std=c++17 -fPIC"  # upstream's: g++ passes over a header that was compiled with others
# The first compile makes the header; those that run meanwhile do without it.
_SCRIPT = """#!/bin/sh
header={folder}/{header}
if mkdir {folder}/made 2>/dev/null; then
  {compiler} {flags} -x c++-header "$header" -o "$header.part" && mv "$header.part" "$header.gch"
fi
exec {compiler} -I{folder} "$@"
"""


def with_precompiled_header() -> tempfile.TemporaryDirectory | None:
    """Set CXX where the compiler is Linux's g++ and nobody has set it; the folder returned has to outlive the tests."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux" or os.environ.get("CXX") or os.environ.get("CC"):
        return None
    source = Path(importlib.util.find_spec("tilelang").origin).with_name("src") / _HEADER
    if not source.exists():
        return None
    folder = tempfile.TemporaryDirectory(prefix="tilelang_ext-c-")
    header = Path(folder.name, _HEADER)
    header.parent.mkdir(parents=True)
    header.write_text(f'#include "{source}"\n')
    script = Path(folder.name, "g++")
    quoted = {"folder": shlex.quote(folder.name), "compiler": shlex.quote(compiler)}
    script.write_text(_SCRIPT.format(header=_HEADER, flags=_FLAGS, **quoted))
    script.chmod(0o755)
    os.environ["CXX"] = str(script)
    return folder
