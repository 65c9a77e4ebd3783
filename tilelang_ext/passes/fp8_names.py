"""TVM's second name of OCP's E4M3 becomes the one by which this package knows it: float8_e4m3 is float8_e4m3fn.

torch's float8_e4m3fn reaches TIR under either name. Without this, AMD's generator took the second one for whatever E4M3 the
chip has, which on gfx942 is FNUZ and reads every code as half its value. Runs before every other pass, on the module as JSON,
where a type is a string wherever it stands.
"""

from __future__ import annotations

import re

from tvm import IRModule
from tvm.ir import load_json, save_json

from tilelang_ext.formats import E4M3

_OTHER_NAME = re.compile(r'"float8_e4m3(x\d+)?"')


def name_e4m3(mod: IRModule) -> IRModule:
    """Return the module with the one name; the module itself if it has no other."""
    text = save_json(mod)
    return load_json(_OTHER_NAME.sub(rf'"{E4M3.dtype}\1"', text)) if _OTHER_NAME.search(text) else mod
